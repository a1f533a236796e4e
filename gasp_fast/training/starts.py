"""`run.json`: what ran. It has an entry for each time that the run was started.

    time, command, resumed_from      the checkpoint's name; null: from the beginning
    versions, commit                 of the packages; the git commit of gasp_fast, if it runs from a checkout
    processes, zero_stage, machines  how many processes run on which GPU (or none) and processor
    seeds                            by their keys in config.yaml
    data                             fingerprints of what the sources read, without opening frames or videos

Environment variables are not recorded: they may hold secrets.
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from gasp_fast.files import read_json, write_atomically
from gasp_fast.processes import processor_name, versions
from gasp_fast.run_folder import STARTS

from .distributed import Processes
from .log import flat
from .objective import Stream

PACKAGES = ("gasp-fast", "torch", "triton", "transformers", "peft", "accelerate", "deepspeed", "liger-kernel")
GIT_SECONDS = 10.0  # a file system may be slow, and the commit is not worth a longer wait


def record_start(config: Any, stream: Stream, processes: Processes, zero_stage: int, resume: Path | None) -> None:
    """Append this start to `run.json`. All processes must call."""
    machines = processes.from_all(machine(processes.device))
    if not processes.first:
        return
    start = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "resumed_from": None if resume is None else resume.name,
        "versions": {"python": platform.python_version(), **versions(*PACKAGES)},
        "commit": commit_of(Path(__file__).parents[1]),
        "processes": processes.world_size,
        "zero_stage": zero_stage,
        "machines": [{**dict(one), "processes": count} for one, count in Counter(map(_items, machines)).items()],
        "seeds": {key: value for key, value in flat(asdict(config)).items() if key.rpartition(".")[2] == "seed"},
        "data": stream.fingerprints,
    }
    path = Path(config.run.out) / STARTS
    text = json.dumps({"starts": [*read_starts(path), start]}, indent=1)
    write_atomically(path, f"{text}\n".encode())


def read_starts(path: Path) -> list[Any]:
    """The earlier starts; none if the file is damaged, which must not end a run."""
    try:
        starts = read_json(path)["starts"] if path.exists() else []
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return starts if isinstance(starts, list) else []


def machine(device: torch.device) -> dict[str, str | None]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"gpu": gpu, "processor": processor_name()}


def commit_of(package: Path) -> dict[str, Any] | None:
    """The git commit of a package, and whether files differ from it. None if it does not run from a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
        return done.stdout.strip()

    try:
        # Fails where the package lies in a repository of something else, as an environment may.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"id": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _items(one: dict[str, str | None]) -> tuple[tuple[str, str | None], ...]:
    return tuple(one.items())

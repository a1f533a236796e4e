"""The files of a training run, by name: which of its checkpoints are there, and where its other results belong.

    RUN/config.yaml, log.jsonl, training.png     as it was understood, as it went
    RUN/checkpoint-N/                            weights and heads.safetensors; whole or not there
    RUN/export/                                  the plain model that `gasp-fast export RUN` makes
    RUN/report/                                  what `gasp-fast evaluate --model RUN` finds

Knows names alone: not what is in the files, nor who writes them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

CONFIG, LOG, FIGURE = "config.yaml", "log.jsonl", "training.png"
HEADS = "heads.safetensors"  # of a checkpoint
EXPORT, REPORT = "export", "report"
_NUMBERED = re.compile(r"checkpoint-(\d+)")


def finished(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _NUMBERED.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def run_of(source: str | os.PathLike[str]) -> Path | None:
    """The run that `source` is, or is a checkpoint of; None for any other model."""
    source = Path(source)
    for folder in (source, source.parent):
        if (folder / CONFIG).is_file() and (folder / LOG).is_file():
            return folder
    return None


def place_for(source: str | os.PathLike[str], name: str) -> Path:
    """Where a result of `source` goes if nobody says."""
    run = run_of(source)
    if run is None:
        raise ValueError(f"{str(source)!r} is no run of gasp_fast.train that could hold the {name}; give --out DIR")
    return run / name

"""Names of the files in a training run's folder.

RUN/config.yaml, log.jsonl, training.png     resolved configuration, log, curves
RUN/checkpoint-N/                            weights and heads.safetensors; complete or absent
RUN/export/                                  the plain model written by `gasp-fast export RUN`
RUN/report/                                  the report written by `gasp-fast evaluate --model RUN`
"""

from __future__ import annotations

import os
import re
from pathlib import Path

CONFIG, LOG, FIGURE = "config.yaml", "log.jsonl", "training.png"
HEADS = "heads.safetensors"  # in a checkpoint
EXPORT, REPORT = "export", "report"
_NUMBERED = re.compile(r"checkpoint-(\d+)")


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    numbered = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _NUMBERED.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def run_containing(source: str | os.PathLike[str]) -> Path | None:
    """The run that `source` is, or is a checkpoint of; None for any other model."""
    source = Path(source)
    for folder in (source, source.parent):
        if (folder / CONFIG).is_file() and (folder / LOG).is_file():
            return folder
    return None


def result_folder(source: str | os.PathLike[str], name: str) -> Path:
    """The default folder for a result of `source`: `name` in its run."""
    run = run_containing(source)
    if run is None:
        raise ValueError(f"{str(source)!r} is no run of gasp_fast.train that could hold the {name}; give --out DIR")
    return run / name

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


def weights_folder(source: Path) -> Path | None:
    """`source` if it holds weights, else the newest checkpoint of the run `source`; None if it has no checkpoint."""
    if _holds_weights(source):
        return source
    newest = next(reversed(checkpoint_folders(source)), None)
    if newest is not None and not _holds_weights(newest):
        raise FileNotFoundError(
            f"{newest} holds no gathered weights (adapter_model.safetensors or model.safetensors); after ZeRO-3 "
            f"without gathering, run {newest}/zero_to_fp32.py first, or pass an older checkpoint"
        )
    return newest


def _holds_weights(folder: Path) -> bool:
    adapters = (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file()
    return adapters or ((folder / "config.json").is_file() and any(folder.glob("model*.safetensors")))


def result_folder(source: str | os.PathLike[str], name: str) -> Path:
    """The default folder for a result of `source`, which is a run or one of its checkpoints: `name` in the run."""
    for folder in (Path(source), Path(source).parent):
        if (folder / CONFIG).is_file() and (folder / LOG).is_file():
            return folder / name
    raise ValueError(f"{str(source)!r} is no run of gasp_fast.train that could hold the {name}; give --out DIR")

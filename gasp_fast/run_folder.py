"""Names of the files in a training run's folder.

RUN/config.yaml, log.jsonl, training.png     resolved configuration at the beginning, log, curves
RUN/config-2.yaml, …                         the configurations with which it was resumed, where they differ
RUN/run.json, skipped.jsonl                  what ran, each time it was started; samples that could not be used
RUN/checkpoint-N/                            weights, heads.safetensors, config.yaml; complete or absent
RUN/best                                     a link to the best checkpoint
RUN/export/, adapters/                       what `gasp-fast export RUN`, or with --adapters, writes
RUN/report/                                  the report written by `gasp-fast evaluate --model RUN`, or by `geometry`
"""

from __future__ import annotations

import os
import re
import sys
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml

from .files import one_line, read_json
from .manifest import MANIFEST, damage

CONFIG, LOG, FIGURE = "config.yaml", "log.jsonl", "training.png"
STARTS, SKIPPED = "run.json", "skipped.jsonl"
HEADS, ABOUT = "heads.safetensors", "about.json"  # in a checkpoint
EXPORT, ADAPTERS, REPORT, BEST = "export", "adapters", "report", "best"
_NUMBERED, _RESUMED = re.compile(r"checkpoint-(\d+)"), re.compile(r"config-([2-9]|[1-9]\d+)\.yaml")


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    numbered = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _NUMBERED.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def check_intact(folder: Path) -> None:
    """Raise if the checkpoint `folder` differs from its manifest. Says so if it has none."""
    if (what := damage(folder)) is not None:
        raise ValueError(
            f"{folder} is damaged: {what}; use another checkpoint, or delete {MANIFEST} there if the change was meant"
        )
    note_unverified(folder)


def note_unverified(folder: Path) -> None:
    """Print that a checkpoint has no manifest, as those of earlier versions."""
    if (folder / ABOUT).is_file() and not (folder / MANIFEST).is_file():
        print(f"{folder} has no {MANIFEST}, as those of earlier versions: its files are not verified", file=sys.stderr)


def weights_folder(source: Path) -> Path | None:
    """`source` if it holds weights, else the newest checkpoint of the run `source`; None if it has no checkpoint.

    `RUN/best` is the checkpoint that it links to. A folder that differs from its manifest is an error.
    """
    if source.is_symlink() and _NUMBERED.fullmatch(str(linked := source.readlink())):
        source = source.parent / linked
    if _holds_weights(source) or (source / MANIFEST).is_file():
        check_intact(source)
        return source
    newest = next(reversed(checkpoint_folders(source)), None)
    if newest is not None:
        check_intact(newest)
    if newest is not None and not _holds_weights(newest):
        raise FileNotFoundError(
            f"{newest} holds no gathered weights (adapter_model.safetensors or model.safetensors); after ZeRO-3 "
            f"without gathering, run {newest}/zero_to_fp32.py first, or pass an older checkpoint"
        )
    return newest


def _holds_weights(folder: Path) -> bool:
    adapters = (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file()
    whole = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    return adapters or whole or holds_only_heads(folder)


def holds_only_heads(folder: Path) -> bool:
    """Whether it is a checkpoint of `train.mode: heads`, whose model is its base model."""
    if not ((folder / HEADS).is_file() and (folder / ABOUT).is_file()):
        return False
    about = read_json(folder / ABOUT)
    return isinstance(about, dict) and about.get("mode") == "heads"


def configuration_of(checkpoint: Path) -> dict[str, Any]:
    """The configuration with which a checkpoint was written; empty if it is unknown.

    In checkpoints of earlier versions it is the run's.
    """
    for path in (checkpoint / CONFIG, checkpoint.parent / CONFIG):
        if path.is_file():
            try:
                config = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, ValueError, RecursionError) as error:
                raise ValueError(f"{path}: not YAML: {one_line(error)}") from error
            return config if isinstance(config, dict) else {}
    return {}


def base_of(checkpoint: Path) -> str | None:
    """The base model of a checkpoint: its configuration names it, or else its adapters do."""
    model = configuration_of(checkpoint).get("model")
    name = model.get("source") if isinstance(model, dict) else None
    if isinstance(name, str):
        return name
    adapter = checkpoint / "adapter_config.json"
    facts = read_json(adapter) if adapter.exists() else {}
    name = facts.get("base_model_name_or_path") if isinstance(facts, dict) else None
    return name if isinstance(name, str) and name else None


def config_files(run: Path) -> list[Path]:
    """The configurations of a run, oldest first: config.yaml, config-2.yaml, …"""
    numbered = [(int(match[1]), path) for path in run.glob("config-*.yaml") if (match := _RESUMED.fullmatch(path.name))]
    first = [run / CONFIG] if (run / CONFIG).is_file() else []
    return first + [path for _, path in sorted(numbered)]


def run_of(source: str | os.PathLike[str]) -> Path | None:
    """The run that `source` is, or of which it is a checkpoint, the export or the report; None if it is none."""
    for folder in (Path(source), Path(source).parent):
        if (folder / CONFIG).is_file() and (folder / LOG).is_file():
            return folder
    return None


def model_name(source: str) -> str:
    """A hub name, or the folder's name, with its parent's for `export`, `model` and `checkpoint-N`."""
    path = Path(source)
    if not path.is_dir():
        return source
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if re.fullmatch(r"checkpoint-\d+|export|model", path.name) else path.name


def weights_fingerprint(folder: Path) -> str:
    """Hash of the names, sizes and times of the weight files; that of nothing for a hub name."""
    digest = blake2b(digest_size=8)
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def result_folder(source: str | os.PathLike[str], name: str) -> Path:
    """The default folder for a result of `source`, which is a run or one of its checkpoints: `name` in the run."""
    if (run := run_of(source)) is None:
        raise ValueError(f"{str(source)!r} is no run of gasp_fast.train that could hold the {name}; give --out DIR")
    return run / name

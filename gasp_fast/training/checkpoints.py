"""Checkpoints of a run: folders `checkpoint-N` that are complete or absent.

    adapter_model.safetensors, adapter_config.json    adapters (train.mode lora)
    model-N-of-M.safetensors, model.safetensors.index.json, config.json, processor
                                                      all weights (train.mode full): loads with transformers alone
    heads.safetensors                                 correspondence heads, and the temperature if it learns; in
                                                      train.mode heads the only weights
    optimizer-N.safetensors                           optimiser, by the names of parameters (`optimizer_state.py`)
    random.safetensors                                random number generators of all processes
    about.json                                        step, schedule, score, how the run was divided, sums not yet
                                                      logged, number of samples, fingerprints of the data and of the
                                                      base model, counters of evaluations on held-out scenes,
                                                      trained parameters without optimiser state
    config.yaml                                       configuration of the run (`same_run.py`)
    manifest.json                                     size and SHA-256 of each file

All processes write into `.checkpoint-N.partial`: each a share of the optimiser's state and of the weights of full
training (`divided_files.py`), the first one all else. When they are done, it adds the manifest and renames the folder.
A checkpoint that differs from its manifest is damaged and not used. How a run continues depends neither on the number
of files nor on that of processes, nor on the ZeRO stage.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from gasp_fast.files import one_line, read_json, share_as
from gasp_fast.manifest import MANIFEST, damage, write_manifest
from gasp_fast.run_folder import ABOUT, BEST, FIGURE, LOG, check_intact, checkpoint_folders, note_unverified

from .distributed import Processes

_KINDS: dict[str, Any] = {  # of the values in about.json
    "step": int,
    "ranks": int,
    "zero_stage": int,
    "mode": str,
    "batch_size": int,
    "score": (int, float, type(None)),
    "bad_steps": int,
    "unlogged": list,
}
_LATER_KINDS: dict[str, Any] = {  # of those that checkpoints of earlier versions lack
    "schedule": int,
    "learning_rate": (int, float),
    "warmup": int,
    "cosine_begins": int,
    "cosine_share": (int, float),
    "steps": int,
    "skipped": int,
    "samples": dict,
    "data": dict,
    "base": (dict, type(None)),
    "held_out": (dict, type(None)),
    "without_state": list,
}


def begin(folder: Path) -> Path:
    """Make the folder in which all processes write what will be the checkpoint `folder`."""
    sweep(folder.parent)
    unfinished = folder.with_name(f".{folder.name}.partial")
    unfinished.mkdir(parents=True)
    return unfinished


@contextmanager
def complete_or_absent(unfinished: Path, folder: Path) -> Iterator[None]:
    """After the block `unfinished` gets its manifest and is renamed to `folder`; if the block raises, it is removed."""
    try:
        yield
        write_manifest(unfinished)
        share_as(unfinished / MANIFEST)
        _remove(folder)  # a damaged one
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def to_resume(out: Path, resume: str, processes: Processes) -> Path | None:
    """The intact checkpoint that `run.resume` names; None: start from the beginning. All processes must call.

    The first process verifies the files, for all. It also removes what a killed run left half written.
    """

    def choose() -> Path | None:
        sweep(out)
        if (out / BEST).is_symlink():  # a run that was killed after a checkpoint may not have renewed it
            link_best(out, best_of(checkpoint_folders(out)))
        chosen = _newest_intact(out) if resume == "auto" else _named(out, resume)
        if chosen is None and (out / FIGURE).exists():
            raise ValueError(
                f"run.out = {str(out)!r} holds a finished run without its checkpoints; give another run.out, or delete "
                f"it ({FIGURE}) to begin anew there"
            )
        return chosen

    return processes.decided_by_first(choose)


def _named(out: Path, resume: str) -> Path | None:
    if resume == "never":
        if checkpoint_folders(out):
            raise ValueError(f"run.out = {str(out)!r} holds checkpoints and run.resume = never; give another run.out")
        return None
    folder = Path(resume)
    if not os.path.isdir(folder):  # no error where the name is too long
        raise OSError(f"run.resume = {resume!r}: no such folder; give a checkpoint-N folder, auto or never")
    if folder.resolve().parent != out.resolve() and ((out / LOG).exists() or checkpoint_folders(out)):
        raise ValueError(
            f"run.resume = {resume!r} is of another run, and run.out = {str(out)!r} holds a run already; give a new "
            "run.out, or run.resume=auto to continue the run that it holds"
        )
    check_intact(folder)
    read_about(folder)
    return folder


def _newest_intact(out: Path) -> Path | None:
    """The newest checkpoint that is not damaged. Damaged ones are named. If all are, that is an error."""
    folders = checkpoint_folders(out)
    for folder in reversed(folders):
        if (what := damage(folder) or _unverifiable(folder)) is None:
            note_unverified(folder)
            return folder
        print(f"gasp_fast.train: {folder} is damaged: {what}; looking for an older one", file=sys.stderr, flush=True)
    if folders:
        raise ValueError(
            f"run.out = {str(out)!r}: all checkpoints are damaged ({folder.name}: {what}); "
            "delete them to begin anew, or give another run.out"
        )
    return None


def _unverifiable(folder: Path) -> str | None:
    """Why a checkpoint without a manifest is not used unasked; None: it has one, or an earlier version wrote it."""
    if (folder / MANIFEST).exists():
        return None
    try:
        about = read_about(folder)
    except (ValueError, OSError) as error:
        return one_line(error)
    return f"{MANIFEST} is missing" if "schedule" in about else None


def read_about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    if not path.exists():
        raise OSError(f"run.resume = {str(folder)!r} is no checkpoint of a training run ({ABOUT} is missing)")
    facts = read_json(path)
    if not isinstance(facts, dict):
        raise ValueError(f"{path} holds no facts about a checkpoint; use another")
    later = {name: kind for name, kind in _LATER_KINDS.items() if name in facts}
    for name, kind in {**_KINDS, **later}.items():
        value = facts.get(name, ...)
        if not isinstance(value, kind) or (isinstance(value, int) and abs(value) >= 1 << 53):
            raise ValueError(f"{path}: {name} is missing or of another kind; use another checkpoint")
    return facts


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what libraries raise for a missing, damaged or foreign file into one line that names `path`."""
    if not path.exists():
        raise OSError(f"{path} is missing; resume from another checkpoint")
    try:
        yield
    except Exception as error:
        refused = isinstance(error, UnpicklingError)  # torch's text explains how to run the file's code after all
        reason = "it holds more than tensors" if refused else one_line(error)
        raise ValueError(f"{path} does not fit this run or is damaged ({reason}); resume from another") from error


# ---- rotation -------------------------------------------------------------------------------------------------------


def rotate(out: Path, keep: int, keep_best: bool) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    folders = checkpoint_folders(out)
    best = best_of(folders) if keep_best else None
    link_best(out, best)
    for folder in folders[:-keep]:
        if folder != best:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, if it is there. It is renamed first: at no moment is half of it there under its name."""
    removed = folder.with_name(f".{folder.name}.removed")
    if folder.exists():
        folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def best_of(folders: list[Path]) -> Path | None:
    """The checkpoint that evaluation on held-out scenes found best; without, the one with the highest score.

    The oldest if several share the score; None if none has one.
    """
    if (best := _best_held_out(folders)) is not None:
        return best
    scores = {folder: score for folder in folders if (score := _score_of(folder)) is not None}
    return max(scores, key=lambda folder: scores[folder], default=None)


def _best_held_out(folders: list[Path]) -> Path | None:
    """The one that the newest checkpoint names, if it is there."""
    try:
        held_out = read_about(folders[-1]).get("held_out") if folders else None
    except (ValueError, OSError):
        return None
    step = held_out.get("best_step") if isinstance(held_out, dict) else None
    return next((folder for folder in folders if folder.name == f"checkpoint-{step}"), None)


def link_best(out: Path, best: Path | None) -> None:
    """Let the link `out/best` name `best`. It always names a checkpoint that is there, or is absent."""
    link, partial = out / BEST, out / f".{BEST}.partial"
    try:
        partial.unlink(missing_ok=True)
        if best is not None:
            partial.symlink_to(best.name)
            partial.replace(link)
        elif link.is_symlink():
            link.unlink()
    except OSError as error:  # some file systems have no links
        print(f"gasp_fast.train: {link} cannot be made: {one_line(error)}; the best is {best}", file=sys.stderr)


def _score_of(folder: Path) -> float | None:
    """None also for a damaged checkpoint: it must not keep a run from saving."""
    try:
        score: float | None = read_about(folder)["score"]
        return score
    except (ValueError, OSError):
        return None


def sweep(out: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for leftover in (*out.glob(".checkpoint-*.partial"), *out.glob(".checkpoint-*.removed")):
        shutil.rmtree(leftover, ignore_errors=True)

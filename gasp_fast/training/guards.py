"""Checks that stop a run that cannot succeed. Each error is one line that names the cause and the cure.

Before the first step: no other run writes into the folder, adapters are on the expected modules, the model places the
tokens of the first batch correctly, and questions about frames are about what it sees of them. Before the run and
before each checkpoint: the disk has free space. After a few steps: every weight that a loss depends on has moved. At
every step: a gradient that is not finite is reported and its step skipped; after too many of them the run stops and
saves the batch. Samples that cannot be used are replaced; if they are too large a share of all, the run stops.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.tracking import get_available_trackers

from gasp_fast.backbones import Backbone, unwrap
from gasp_fast.data.questions.scene_frames import Rectangle
from gasp_fast.files import one_line, replacing
from gasp_fast.run_folder import SKIPPED

from .config import RunConfig, TrainConfig
from .model import SupervisedModel
from .sources import VideoQuestions
from .stream import SampleStream

if TYPE_CHECKING:
    from .objective import Stream
from .weights import gathered

TRACKERS = ("tensorboard", "wandb", "trackio")
FEW_SAMPLES = 200  # the share skipped while a run goes on is one of at least so many: a few at its start say little
SAME_PART = 0.01  # pixels
LEARNING_STEPS = 5  # after these, even during warm-up, every head and adapter must have moved


class GuardError(ValueError):
    """The run must not start, or must not continue."""


def disk_is_low(config: RunConfig) -> bool:
    """Of a run whose folder exists; a dry run has none."""
    return Path(config.out).is_dir() and shutil.disk_usage(config.out).free / 1e9 < config.min_free_gb


def check_disk(config: RunConfig) -> None:
    out = Path(config.out).absolute()  # a dry run does not make it
    free = shutil.disk_usage(next(folder for folder in (out, *out.parents) if folder.exists())).free / 1e9
    if free < config.min_free_gb:
        raise GuardError(
            f"run.min_free_gb = {config.min_free_gb:g}, but only {free:.1f} GB are free in run.out = {config.out!r}; "
            "free some space or lower it"
        )


def check_sharding(config: TrainConfig, stage: int) -> None:
    """ZeRO-3 has the weights of a module only while it runs, and gathers them for its backward pass only where its
    input has a gradient. Supervision runs projections once more, and a frozen model has no gradients."""
    if stage != 3:
        return
    if config.loss.geometric and config.heads.live:
        raise GuardError(
            f"heads.kind = {config.heads.kind} needs the weights of the model's projections after their layer has run, "
            "which ZeRO-3 divides again; use configs/deepspeed/zero2.json"
        )
    if config.train.mode == "heads":
        raise GuardError(
            f"deepspeed = {config.deepspeed!r} is ZeRO-3, which does not work with train.mode = heads; use "
            "configs/deepspeed/zero2.json or deepspeed=null: without a backward pass the model needs little memory"
        )


def check_trackers(config: RunConfig) -> None:
    available = {str(tracker) for tracker in get_available_trackers()}
    for name in config.report_to:
        if name not in available:
            if name not in TRACKERS:
                raise GuardError(f"run.report_to = {name!r} is not known; choose among {', '.join(TRACKERS)}")
            cure = f"run {sys.executable} -m pip install {name}, or leave it out"
            raise GuardError(f"run.report_to = {name!r}, which is not installed; {cure}")


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Lock `out`: no other run can write into it meanwhile. The lock ends with the process, however that ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"run.out cannot be made: {one_line(error)}; name another folder") from error
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GuardError(
                f"run.out = {str(out)!r}: another run is writing there; wait for it, stop it, or name another folder"
            ) from None
        except OSError:  # some file systems of clusters have no locks
            pass
        yield
    finally:
        os.close(folder)


def check_adapters(model: SupervisedModel) -> int:
    """Check that q, k, v and o of every decoder layer have an adapter, and nothing else. Returns their number."""
    backbone, inner = model.backbone, unwrap(model.model)
    adapted = {name.split(".lora_A")[0] for name, _ in inner.named_parameters() if ".lora_A" in name}
    wrong = sorted(name for name in adapted if not re.fullmatch(backbone.lora_targets, name))
    expected = 4 * backbone.layer_count
    if wrong or len(adapted) != expected:
        also = f", among them {wrong[0]}" if wrong else ""
        raise GuardError(
            f"adapters sit on {len(adapted)} modules{also}; {expected} are expected (q, k, v, o of "
            f"{backbone.layer_count} decoder layers): lora_targets of {type(backbone).__name__} does not fit this model"
        )
    return len(adapted)


def check_positions(model: SupervisedModel, batch: dict[str, Any]) -> None:
    """Run the backbone's check of its inputs (for Qwen: three-dimensional positions) on a batch."""
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    model.backbone.check_inputs(model.model, inputs)


class LearningGuard:
    """Checks that every adapter's B (which starts at zero) and every head has moved after a few steps.

    It compares sums of weights with those before the first step: a gradient that is zero, or does not arrive, leaves
    them unchanged. All processes take part, because ZeRO-3 gathers weights from all.
    """

    def __init__(self, model: SupervisedModel, steps: int = LEARNING_STEPS) -> None:
        self.steps = steps  # after which to check
        self.language = model.lm_weight > 0
        self.watched = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and ("lora_B" in name or (name.startswith("supervision.") and "weight" in name))
        }
        self.highest = -1 if model.supervision is None else model.supervision.highest
        live = [] if model.supervision is None else model.supervision.live_weights
        self.live = {id(weight) for weight in live}  # those of projections that are supervised themselves
        self.before = self._sums()
        self.saw_matches = False
        self.answers = 0  # labelled tokens so far

    def _sums(self) -> dict[str, float]:
        weights = ((name, gathered(parameter).double()) for name, parameter in self.watched.items())
        return {name: float(weight.abs().sum() + weight.square().sum()) for name, weight in weights}

    def add(self, outputs: dict[str, Any], batch: dict[str, Any]) -> None:
        """Note which losses a micro-batch had."""
        self.saw_matches |= len(batch["matches"]) > 0
        self.answers += outputs["answers"]

    def check(self) -> None:
        """Raise if a weight that a loss depends on has not changed."""
        now, saw_answers = self._sums(), self.language and self.answers > 0
        reached = [name for name in now if self._is_reached(name, saw_answers)]
        fixed = [name for name in reached if now[name] == self.before[name]]
        if fixed:
            raise GuardError(
                f"{len(fixed)} of {len(reached)} watched weights have not moved after {self.steps} steps, the first is "
                f"{fixed[0]}: no gradient reaches them. Look at train.checkpointing, heads.layers and the loss weights"
            )

    def _is_reached(self, name: str, saw_answers: bool) -> bool:
        """Whether a loss so far depends on the weight: heads need matches, adapters a loss at their layer or above."""
        if name.startswith("supervision.") or id(self.watched[name]) in self.live:
            return self.saw_matches
        layer = re.search(r"layers\.(\d+)\.", name)
        return saw_answers or (self.saw_matches and layer is not None and int(layer[1]) <= self.highest)


def check_bad_steps(
    config: RunConfig, count: int, cause: str, batches: Sequence[dict[str, Any]], batch_file: Path
) -> None:
    """If more steps than allowed (`count`) had no finite gradient, save this process's batches and stop the run."""
    if count > config.bad_steps:
        with replacing(batch_file) as partial:
            torch.save(list(batches), partial)
        raise GuardError(
            f"{cause}; {count} such steps, run.bad_steps = {config.bad_steps} may be skipped. "
            f"The batch is in {batch_file}"
        )


def check_left_out(config: RunConfig, stream: Stream) -> list[str]:
    """Check that most of the data can be used at all. Returns lines about what is left out of each source."""
    lines = []
    for name, source in stream.sources.items():
        lines += source.remarks
        count = len(source.left_out)
        if not count:
            continue
        line = f"data.{name}: {count:,} of {source.found:,} cannot be used; the first, {source.left_out[0]}"
        if count > config.max_skipped * source.found:
            raise GuardError(f"{line}; run.max_skipped = {config.max_skipped:g}: repair the data or raise it")
        lines.append(line)
    return lines


def check_seen_parts(stream: SampleStream, backbone: Backbone) -> None:
    """Check that the positions in questions about frames are positions in what this model sees of a frame."""
    for name, source in stream.sources.items():
        found = source.seen_part() if isinstance(source, VideoQuestions) else None
        if found is None:
            continue
        (width, height), asked = found
        seen = backbone.frame_grid(width, height).rectangle
        if max(abs(a - b) for a, b in zip(seen, asked, strict=True)) > SAME_PART:
            raise GuardError(
                f"data.{name}.root = {source.root!r} asks about the part {_edges(asked)} of frames of {width} x "
                f"{height} pixels (left, top, right, bottom), this model sees {_edges(seen)}; make the questions for "
                f"it: gasp-fast make-vqa --model {backbone.source}"
            )


def _edges(part: Rectangle) -> str:
    return ", ".join(f"{edge:.1f}" for edge in part)


def check_skipped(config: Any, count: int, step: int) -> None:
    """Stop the run if more than the allowed share of all samples so far was skipped (`count`)."""
    drawn = step * config.train.batch_size
    if count > config.run.max_skipped * max(drawn, FEW_SAMPLES):
        raise GuardError(
            f"step {step}: {count:,} of {drawn:,} samples could not be used, run.max_skipped = "
            f"{config.run.max_skipped:g}; {Path(config.run.out) / SKIPPED} names them: repair the data or raise it"
        )

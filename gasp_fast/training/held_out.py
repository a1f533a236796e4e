"""Evaluation on held-out sequences while training: when, on which process, and what follows from it.

Every `evaluate.every` steps all processes run their share of the sequences through the present model. The first one
computes the metrics from all predictions, and the others receive them. The metric `evaluate.best` decides about

    the best checkpoint    a new best is saved at once, kept, and named by the link `best` in the run's folder
    early stopping         after `evaluate.patience` evaluations without a new best the run is saved and ends

Training goes on as without evaluation, to the bit: modules and random number generators are restored, no gradient is
computed, no batch is drawn. The counters are in every checkpoint, so a resumed run decides as the uninterrupted one.

Under ZeRO-3 a forward pass gathers weights from all processes, so all run equally many sequences: where their number
does not divide, some run a sequence that another one runs as well.

What is measured is not decided here: training and evaluation do not import each other, and `train.py` passes an object
of `gasp_fast/evaluation/held_out.py` that has the methods of `HeldOutSequences`.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from .config import TrainConfig
from .curves import measures_of
from .distributed import Processes

if TYPE_CHECKING:
    from .objective import Objective

Metrics = dict[str, Any]


class HeldOutSequences(Protocol):
    """Sequences by index, and the metrics of what the model made of all of them (`Objective.outcomes`)."""

    def __len__(self) -> int: ...

    def metrics(self, outcomes: Mapping[int, Any]) -> Metrics:
        """Numbers by name, those of `EvaluateConfig.best` among them; None: undefined."""


class HeldOut:
    """Evaluates the present model, and counts the evaluations since the best one. Without `sequences` it is off."""

    def __init__(
        self,
        objective: Objective,
        processes: Processes,
    ) -> None:
        self.objective, self.processes = objective, processes
        self.config, self.sequences = objective.config.evaluate, objective.sequences
        self.usable: list[int] = []  # sequences, of all processes
        self.share: list[int] = []  # of these, for this process; some may be another one's, too
        self.best: float | None = None
        self.best_step = 0
        self.without_best = 0  # evaluations since then

    def begin(self, state: Any = None) -> None:
        """Read this process's sequences, and continue from the `state` of a checkpoint. All processes must call."""
        if self.sequences is None:
            return
        rank, world_size = self.processes.rank, self.processes.world_size
        own = self.objective.usable(range(rank, len(self.sequences), world_size))
        self.usable = sorted(index for part in self.processes.from_all(own) for index in part)
        if not self.usable:
            raise ValueError(
                f"evaluate.scenes: none of {len(self.sequences)} sequences can be evaluated; check the scenes with "
                "gasp-fast scenes, or leave evaluate.scenes empty"
            )
        rounds = -(-len(self.usable) // world_size)
        self.share = [self.usable[(number * world_size + rank) % len(self.usable)] for number in range(rounds)]
        self._restore(state)

    def due(self, step: int, steps: int) -> bool:
        """Whether to evaluate after `step`: every `evaluate.every` steps, and after the last one."""
        return self.sequences is not None and (step % self.config.every == 0 or step == steps)

    def evaluate(self, step: int) -> Metrics:
        """Measure the present model; what the log says about it. All processes must call."""
        assert self.sequences is not None
        start = time.perf_counter()
        device = self.processes.device
        precision = torch.autocast(device.type, torch.bfloat16, enabled=self.objective.dtype == torch.bfloat16)
        with undisturbed(self.objective.model, device), precision:
            own = self.objective.outcomes(self.share, device)
        parts = self.processes.from_all(dict(own))
        together = {index: outcome for part in parts for index, outcome in part.items()}
        sequences = self.sequences
        # On one process: on unlike processors the last bit may differ, but all must decide alike.
        metrics = self.processes.decided_by_first(lambda: sequences.metrics(together))
        better = self._count(step, metrics[self.config.best])
        return {**metrics, "best": better, "seconds": time.perf_counter() - start}

    def _count(self, step: int, value: float | None) -> bool:
        """Whether `value` is the best one so far. The first of equal ones stays the best; None is never better."""
        better = value is not None and (self.best is None or value > self.best)
        if better:
            self.best, self.best_step, self.without_best = value, step, 0
        else:
            self.without_best += 1
        return better

    @property
    def out_of_patience(self) -> bool:
        return self.config.patience is not None and self.without_best >= self.config.patience

    def last_words(self, step: int, out: Path) -> str:
        """Why the run ended early."""
        value = "undefined so far" if self.best is None else f"the best, {self.best:.4f}, is of step {self.best_step}"
        count = f"{self.without_best} evaluation{'s' if self.without_best > 1 else ''}"
        return (
            f"step {step}: stopped early: no better {self.config.best} in {count} (evaluate.patience); {value}: {out}"
        )

    # ---- in checkpoints ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any] | None:
        """For about.json; None if it is off."""
        if self.sequences is None:
            return None
        counters = {"best": self.best, "best_step": self.best_step, "without_best": self.without_best}
        return {**counters, "settings": self._settings()}

    def _restore(self, state: Any) -> None:
        """Continue from the `state` of a checkpoint; with other settings, numbers cannot be compared."""
        if not isinstance(state, dict):
            return
        if state.get("settings") != self._settings():
            if self.processes.first:
                what = "the settings of evaluate, or the sequences that can be read, have changed"
                print(f"gasp_fast.train: {what}: the best checkpoint is chosen anew", file=sys.stderr)
            return
        try:
            self.best = None if state["best"] is None else float(state["best"])
            self.best_step, self.without_best = int(state["best_step"]), int(state["without_best"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint's counters of evaluations are damaged ({error}); use another") from error

    def _settings(self) -> Any:
        """What the values of the metric depend on, as JSON gives it back."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in ("every", "patience")}
        return json.loads(json.dumps({**settings, "usable": self.usable}))


# ---- the present model ----------------------------------------------------------------------------------------------


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients. Afterwards modules and random number generators are as they were."""
    training = [module for module in model.modules() if module.training]
    python, legacy = random.getstate(), np.random.get_state()
    try:
        # Not inference_mode: ZeRO-3 would gather weights into tensors that cannot be trained with afterwards.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            model.eval()
            yield
    finally:
        for module in training:
            module.training = True
        random.setstate(python)
        np.random.set_state(legacy)


@contextmanager
def gathered_together(module: nn.Module | None) -> Iterator[None]:
    """Under ZeRO-3, gather the weights of a module that is called outside the model's forward pass."""
    divided = [] if module is None else [weight for weight in module.parameters() if hasattr(weight, "ds_id")]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided):
        yield


# ---- what to evaluate, in words and in numbers ----------------------------------------------------------------------


def share_held_out(config: TrainConfig, scenes: Path) -> float:
    """The share of `scenes` to evaluate on, by `data.scenes.held_out`; 0: all, because none of them is trained on."""
    named = config.data.counted.get("scenes")
    if named is None:
        return 0.0
    folder, root = scenes.resolve(), Path(named.root).resolve()
    if folder != root and root not in folder.parents and folder not in root.parents:
        return 0.0
    share: float = config.data.scenes.held_out
    if not share and not config.data.scenes.only_counted:
        raise ValueError(
            f"evaluate.scenes = {str(scenes)!r} is trained on; set data.scenes.held_out=0.05 to leave a share of its "
            "scenes out of training, or name other scenes"
        )
    return share


def kind_of_features(config: TrainConfig) -> Literal["head", "qk", "hidden"]:
    """What is matched: what is supervised, if nothing else is chosen."""
    kind, heads = config.evaluate.features, config.loss.geometric and config.heads.own
    if kind == "head" and not heads:
        raise ValueError("evaluate.features = 'head', but this run has no heads; write hidden or qk")
    if kind == "auto":
        return "head" if heads else "qk" if config.loss.geometric else "hidden"
    return kind


def in_words(metrics: Metrics) -> str:
    """The main numbers of an evaluation, in one line."""
    parts = [f"{name} {metrics[name]:.3f}" for name in measures_of(metrics) if metrics[name] is not None]
    parts += [f"best layer {metrics['peak_layer']}"] if metrics.get("peak_layer") else []
    parts += [f"{metrics['sequences']} sequences in {metrics['seconds']:.1f} s"]
    return "held out: " + " · ".join(parts) + (" · the best so far" if metrics["best"] else "")


def scalars(metrics: Metrics) -> dict[str, float]:
    """The metrics as trackers take them: one number a name, as in `held_out/pck/layer_3`; layers count from 1."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if name.endswith("_per_layer"):
            kind = name.removesuffix("_per_layer")
            rows = zip(metrics["layers"], value, strict=True)
            numbers |= {f"held_out/{kind}/layer_{layer}": number for layer, number in rows if number is not None}
        elif isinstance(value, int | float):
            numbers[f"held_out/{name}"] = float(value)
    return numbers

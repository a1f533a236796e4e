"""What the training loop asks of the thing that it trains.

The loop knows steps, processes, checkpoints and logs. What the model is, what a batch holds, what its losses are called
and what is worth saving, it asks an `Objective`. GASP's is `gasp.py`.

A step's loss does not depend on how the step is divided. Each batch has `counts`, float64 [C]: what the means of its
losses are over (`averages.py`). The forward pass gets `shares`, float32 [C]: the batch's part of the counts of the
whole step. Its terms, multiplied by them, add up to those of the step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gasp_fast.planning.dealing import DealtStep

from .distributed import Processes
from .divided_files import Dealt
from .optim import Group, Schedule
from .same_run import Rules
from .skipped import Skipped
from .stream import Share

Batch = dict[str, Any]
Record = dict[str, Any]  # a line of the log


@dataclass(frozen=True)
class Term:
    """A part of the outputs whose mean the log shows."""

    name: str  # in the outputs of the forward pass
    counted: str  # which of `Objective.counts` it is a mean over: steps in which that is 0 do not have it
    layers: int | None = None  # it has a value for each of so many layers; None: one value
    is_loss: bool = True


class Samples(Protocol):
    """A source of samples, as guards and checkpoints see it."""

    found: int  # samples, usable or not
    left_out: list[Skipped]
    remarks: list[str]  # lines to print before the run

    def __len__(self) -> int: ...


class Stream(Protocol):
    """The samples of a run by position."""

    @property
    def sources(self) -> Mapping[str, Any]: ...  # of `Samples`

    @property
    def left_out(self) -> list[Skipped]: ...

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]: ...

    def describe(self, position: int) -> str: ...


class Weights(Protocol):
    """The trained weights, copied for a checkpoint."""

    @property
    def whole(self) -> Dealt | None: ...  # those that all processes write, each a share


class LearningGuard(Protocol):
    """Checks after `steps` steps that weights move."""

    steps: int

    def add(self, outputs: dict[str, Any], batch: Batch) -> None: ...

    def check(self) -> None: ...


class Objective(ABC):
    """A model, its data and its losses, as the training loop sees them.

    It is made from a configuration and its data. `build` adds the model, which takes longer: what can be refused before
    is refused before.
    """

    config: Any  # with `run`, `train`, `evaluate` and `deepspeed`
    model: nn.Module  # its forward pass takes a batch and `shares`, and returns the `loss` and the `terms`
    dtype: torch.dtype  # that products run in, and to which adapters are cast once a step
    hidden_size: int
    stream: Any  # a `Stream`
    counts: tuple[str, ...]  # names of the first entries of a batch's `counts`
    terms: tuple[Term, ...]
    next_command: str  # what to do with the finished `{model}`
    head_seconds: float = 0.0  # of building the model, for correspondence heads
    may_skip_weights: bool = False  # a step may leave some without a gradient: DDP has to look for them
    sequences: Any = None  # `HeldOutSequences`, or None: to evaluate on while training

    # ---- before the first step ----

    @property
    @abstractmethod
    def steps(self) -> int:
        """Optimiser steps of the run."""

    @abstractmethod
    def share(self, processes: Processes) -> Share:
        """This process's share of each step, before `deal` is known."""

    @abstractmethod
    def build(self, device: torch.device) -> None:
        """Make the model, on the CPU, the same on every process."""

    @abstractmethod
    def groups(self) -> Iterator[Group]:
        """The trained parameters, before they are divided among processes."""

    @abstractmethod
    def make_optimizer(self) -> torch.optim.Optimizer: ...

    @abstractmethod
    def schedule(self, steps: int) -> Schedule: ...

    def prepare_for_deepspeed(self) -> None:  # noqa: B027 - most models need nothing
        """Say what ZeRO-3 must gather together."""

    @abstractmethod
    def loader(self, share: Share, steps: int, done: int, pin_memory: bool) -> DataLoader[Any]:
        """The batches of this process, from the step after `done` on."""

    @abstractmethod
    def deal(self, share: Share, processes: Processes) -> Callable[[int], DealtStep] | None:
        """How the samples of a step are dealt to the processes; None: in their order. All processes must call."""

    @abstractmethod
    def learning_guard(self) -> LearningGuard: ...

    @abstractmethod
    def describe(self, share: Share, processes: Processes) -> str:
        """What is trained and what that takes, in lines."""

    # ---- a step ----

    def check_first(self, batch: Batch) -> None:  # noqa: B027 - not every model has something to check
        """Raise if the model would misread the first batch."""

    @abstractmethod
    def flops(self, batch: Batch) -> float:
        """Of a forward and backward pass over a batch on the CPU."""

    @abstractmethod
    def tokens(self, batch: Batch) -> int: ...

    def logged(self, outputs: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        """Those `terms` that a batch has."""
        return {term.name: outputs[term.name] for term in self.terms if term.name in outputs}

    @abstractmethod
    def score(self, record: Record) -> float | None:
        """The number by which the best checkpoint is chosen, from a log line; larger is better."""

    # ---- evaluation and checkpoints ----

    @abstractmethod
    def outcomes(self, indices: Sequence[int], device: torch.device) -> Mapping[int, Any]:
        """What the present model, in evaluation mode, makes of `sequences`."""

    @abstractmethod
    def usable(self, indices: Sequence[int]) -> list[int]:
        """Those of `sequences` that can be evaluated."""

    @abstractmethod
    def gather_weights(self, processes: Processes, in_place: bool = False) -> Weights:
        """Copy the trained weights to host memory. All processes must call."""

    @abstractmethod
    def write_weights(self, folder: Path, weights: Any) -> None:
        """What the first process writes: all but `whole`."""

    @abstractmethod
    def read_weights(self, folder: Path) -> None:
        """Load the trained weights of a checkpoint into a model that is not divided yet."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the configuration led to, for about.json: `steps`, `samples`, `data`, `base`."""

    @property
    @abstractmethod
    def rules(self) -> Rules:
        """What of the configuration may change when a run is resumed."""

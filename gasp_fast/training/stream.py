"""The stream of training samples: which sample is at which position, and which process takes it at which step.

A sample is a function of its position in the stream, and step `n`, counted from 0, has the positions from
`n · batch_size` on. Which process takes which of them is a function of the step, too. So an exact resume needs only the
number of steps, and a step has the same samples on one process and on thirty-two.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, Protocol

from torch.utils.data import Dataset, Sampler

from gasp_fast.collator import CollatorConfig, Sample
from gasp_fast.data.mixture import Mixture, Source
from gasp_fast.planning.dealing import DealtStep, Division, deal
from gasp_fast.planning.micro_batch_time import MicroBatchSeconds
from gasp_fast.planning.training_setup import SequenceSize, micro_batches
from gasp_fast.processes import usable_cores

from .optim import OptimisationConfig
from .skipped import Skipped
from .sources import Outline, QAConfig, Samples, ScenesConfig, TrackedScenes, TrainingSample, VideoQuestions

FEWEST_FOR_LIMIT = 64  # loader processes that every machine may start: a recipe is also planned on small ones


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data: one stream that interleaves the sources by weight."""

    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    qa: QAConfig = field(default_factory=QAConfig)
    vqa: QAConfig = field(default_factory=QAConfig)  # more questions, such as those of the VQA baseline
    collator: CollatorConfig = field(default_factory=CollatorConfig)
    workers: int = 4  # loader processes of each training process; 0: load in the training process
    seed: int = 0  # of the order of samples

    def __post_init__(self) -> None:
        for name, source in self._named().items():
            if not 0 <= source.weight < math.inf:
                raise ValueError(f"data.{name}.weight = {source.weight} must be finite and 0 or more")
        if not any(source.root for source in self._named().values()):
            raise ValueError("data names no source; give data.scenes.root, data.qa.root or data.vqa.root")
        if self.scenes.only_counted and not (self.scenes.root and self.scenes.weight > 0):
            raise ValueError(
                "data.scenes.only_counted = true has no scenes to count; give data.scenes.root, and data.scenes.weight "
                "as in the run whose steps it takes"
            )
        if not self.used:
            name, key = next((name, f"{name}.weight = 0") for name, source in self._named().items() if source.root)
            if name == "scenes" and self.scenes.only_counted:
                key = "scenes.only_counted = true"
            raise ValueError(f"data.{key} leaves no source to train on; give one a root and a weight above 0")
        for name, source in self.used.items():
            if isinstance(source, QAConfig) and source.frames is None and not self.scenes.root:
                raise ValueError(
                    f"data.{name}.frames = null takes frames of scenes; give data.scenes.root (with "
                    "data.scenes.weight=0 nothing else of them is trained on)"
                )
        most = max(FEWEST_FOR_LIMIT, 4 * usable_cores())
        if not 0 <= self.workers <= most:
            raise ValueError(
                f"data.workers = {self.workers} must be 0 or more, and at most {most} here: this machine has "
                f"{usable_cores()} cores, and each loader process holds hundreds of megabytes"
            )

    @property
    def used(self) -> dict[str, ScenesConfig | QAConfig]:
        """The sources that are trained on, by name: they have a root and a weight."""
        return self._without("scenes" if self.scenes.only_counted else "")

    @property
    def counted(self) -> dict[str, ScenesConfig | QAConfig]:
        """The sources whose lengths and weights make an epoch: those that are trained on, or `scenes` and `qa`.

        The latter with `scenes.only_counted`: the run takes the steps of one that trains on the scenes and `qa`.
        """
        return self._without("vqa") if self.scenes.only_counted else self.used

    def epoch(self, lengths: Mapping[str, int]) -> int:
        """Positions in a pass through the first counted source; `lengths` are samples of an epoch of each."""
        sources = {name: Source(lengths[name], source.weight) for name, source in self.counted.items()}
        return Mixture(sources).epoch

    def _without(self, left_out: str) -> dict[str, ScenesConfig | QAConfig]:
        """The sources with a root and a weight, but for one."""
        named = self._named().items()
        return {name: source for name, source in named if source.root and source.weight > 0 and name != left_out}

    def _named(self) -> dict[str, ScenesConfig | QAConfig]:
        return {"scenes": self.scenes, "qa": self.qa, "vqa": self.vqa}


class SampleStream(Dataset[Sample]):
    """The endless interleaving of the sources, by position. Pickles into loader workers."""

    def __init__(
        self,
        config: DataConfig,
        once: Callable[[Callable[[], TrackedScenes]], TrackedScenes] = lambda read: read(),
    ) -> None:
        """`once` lets one process read the scenes for all of them, as `Processes.decided_by_first` does."""
        for name, source in config.used.items():
            if not os.path.isdir(source.root):
                raise OSError(f"data.{name}.root = {source.root}: no such folder")
        self.sources: dict[str, Samples] = {
            name: once(partial(TrackedScenes, source, max(1, config.workers)))
            if isinstance(source, ScenesConfig)
            else VideoQuestions(source, f"data.{name}", config.scenes)
            for name, source in config.used.items()
        }
        lengths = {name: len(source) for name, source in self.sources.items()}
        mixed = {name: Source(lengths[name], source.weight) for name, source in config.used.items()}
        self.mixture = Mixture(mixed, config.seed)
        if config.scenes.only_counted:
            lengths["scenes"] = len(once(partial(TrackedScenes, config.scenes, max(1, config.workers))))
        self.epoch = config.epoch(lengths)  # positions in a pass through the scenes; without scenes, the first source

    def __getitem__(self, position: int) -> TrainingSample:
        """The sample at a position. If it cannot be read, another one of its source is in its place."""
        draw = self.mixture.draw(position)
        return self.sources[draw.source].sample(draw.epoch, draw.index, position)

    def instead_of(self, sample: TrainingSample, error: Exception) -> TrainingSample:
        """Another sample of the source for one that raised `error` when it was encoded."""
        draw = self.mixture.draw(sample.position)
        return self.sources[draw.source].instead_of(sample, draw.epoch, draw.index, error)

    @property
    def left_out(self) -> list[Skipped]:
        """What the sources cannot use, found before the first step."""
        return [one for source in self.sources.values() for one in source.left_out]

    @cached_property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Of what each source reads."""
        return {name: source.fingerprint() for name, source in self.sources.items()}

    def outline(self, position: int) -> tuple[str, Outline]:
        """The source of the sample at a position, and what is known of it before it is read."""
        draw = self.mixture.draw(position)
        return draw.source, self.sources[draw.source].outline(draw.epoch, draw.index)

    def frame_sizes(self) -> dict[str, tuple[int, int]]:
        """(width, height) of the frames of each source. Reads one frame of each."""
        return {name: source.frame_size() for name, source in self.sources.items()}

    def describe(self, position: int) -> str:
        """Name the sample at a position, for messages."""
        draw = self.mixture.draw(position)
        return f"{draw.source}[{draw.index}] of epoch {draw.epoch}, {self.sources[draw.source].name(draw.index)}"


@dataclass(frozen=True)
class Share:
    """This process's share of each optimiser step."""

    rank: int
    world_size: int
    batch_size: int  # of a step, over all processes
    micro_batch_size: int | None = None  # sequences; None: 1, or as `tokens_at_once` says
    tokens_at_once: int | None = None  # most tokens of a micro-batch, in place of a number of sequences
    deal: Callable[[int], DealtStep] | None = None  # the places of a step's samples; None: in the order of positions

    @staticmethod
    def of(train: OptimisationConfig, rank: int, world_size: int) -> Share:
        return Share(rank, world_size, train.batch_size, train.micro_batch_size, train.tokens_at_once)

    def __post_init__(self) -> None:
        _ = self.accumulation  # raises where the batch does not divide

    @property
    def accumulation(self) -> int | None:
        """Micro-batches of each process in a step; None if that differs from step to step."""
        if self.tokens_at_once is not None:
            return None
        return micro_batches(self.batch_size, self.micro_batch_size or 1, self.world_size)

    def useful_share(self, step: int) -> float:
        """Of the time that the slowest process computes in a step, what the others do in the mean, by prediction."""
        return 1.0 if self.deal is None else self.deal(step).useful_share

    def micro_batches(self, step: int) -> list[list[int]]:
        """The positions in each of this process's micro-batches of a step, counted from 0. Some may be empty."""
        start = step * self.batch_size
        if self.deal is not None:
            return [[start + place for place in places] for places in self.deal(step).places[self.rank]]
        each = self.micro_batch_size or 1
        starts = range(start + self.rank * each, start + self.batch_size, self.world_size * each)
        return [list(range(first, first + each)) for first in starts]


class Dealer:
    """Deals the samples of a step to processes and micro-batches by predicted cost. The same in every process."""

    def __init__(
        self, batch_size: int, sizes: Callable[[int], SequenceSize], division: Division, seconds: MicroBatchSeconds
    ) -> None:
        self.batch_size, self.sizes, self.division, self.seconds = batch_size, sizes, division, seconds
        self.deal = lru_cache(maxsize=256)(self._deal)  # the loader is ahead of the training loop

    def _deal(self, step: int) -> DealtStep:
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return deal([self.sizes(position) for position in positions], self.division, self.seconds)


class Divided(Protocol):
    """What says which positions in the stream are this process's, as `Share` does."""

    def micro_batches(self, step: int) -> list[list[int]]: ...


class StreamBatches(Sampler[list[int]]):
    """The micro-batches of one process for the steps after `done` up to `steps`, as positions in the stream."""

    def __init__(self, share: Divided, steps: int, done: int = 0) -> None:
        self.share, self.steps = share, range(done, steps)

    def __iter__(self) -> Iterator[list[int]]:
        return (positions for step in self.steps for positions in self.share.micro_batches(step))

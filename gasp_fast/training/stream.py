"""The stream of training samples: which sample is at which position, and which process takes it at which step.

A sample is a function of its position in the stream, and step `n`, counted from 0, has the positions from
`n · batch_size` on. Which process takes which of them is a function of the step, too. So an exact resume needs only the
number of steps, and a step has the same samples on one process and on thirty-two.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from gasp_fast.backbones import Backbone
from gasp_fast.backbones.packing import pack
from gasp_fast.collator import Collator, CollatorConfig, Sample
from gasp_fast.config.limits import LARGEST_SEED, check_whole
from gasp_fast.data.errors import one_line
from gasp_fast.data.mixture import Mixture, Source
from gasp_fast.planning.dealing import DealtStep, Division, deal
from gasp_fast.planning.micro_batch_time import MicroBatchSeconds
from gasp_fast.planning.training_setup import SequenceSize, micro_batches
from gasp_fast.processes import in_time, usable_cores

from .objective import Average, averaged, unit_of_matches
from .optim import OptimisationConfig
from .signals import end_with_trainer
from .skipped import Skipped
from .sources import Outline, QAConfig, Samples, ScenesConfig, TrackedScenes, TrainingSample, VideoQuestions

FEWEST_FOR_LIMIT = 64  # loader processes that every machine may start: a recipe is also planned on small ones
BLANK = 56  # pixels along each side of the blank frame: small, but large enough for every processor
PATIENCE = 1.0  # seconds; while a batch is awaited, the loader checks so often whether a worker has died


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
        most = max(FEWEST_FOR_LIMIT, 4 * usable_cores())
        if not 0 <= self.workers <= most:
            raise ValueError(
                f"data.workers = {self.workers} must be 0 or more, and at most {most} here: this machine has "
                f"{usable_cores()} cores, and each loader process holds hundreds of megabytes"
            )
        check_whole(self.collator, ("seed",), "data.collator.", least=0, most=LARGEST_SEED)

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
            else VideoQuestions(source, f"data.{name}")
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


class StreamBatches(Sampler[list[int]]):
    """The micro-batches of one process for the steps after `done` up to `steps`, as positions in the stream."""

    def __init__(self, share: Share, steps: int, done: int = 0) -> None:
        self.share, self.steps = share, range(done, steps)

    def __iter__(self) -> Iterator[list[int]]:
        return (positions for step in self.steps for positions in self.share.micro_batches(step))


class SteadyCollator:
    """A `Collator` for training: its batches always have at least one frame, a `token_index`, and `counts`.

    A batch of no samples holds a blank frame, without an answer and without a match, and counts nothing.
    `token_index` is a `TokenIndex`; `counts` is what the terms of the loss are averaged over (`objective.py`). With
    `packing`, the sequences lie one after another in one row. Loader workers get it pickled.
    """

    def __init__(self, collate: Collator, average: Average = "sequence", packing: bool = False) -> None:
        self.collate, self.average, self.packing = collate, average, packing

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        if not any(len(sample.frames) for sample in samples):
            samples = [*samples, Sample(frames=[np.full((BLANK, BLANK, 3), 127, np.uint8)])]
        batch = self.collate(samples)
        batch = {**batch, "token_index": self.collate.backbone.index_tokens(batch)}
        return averaged(pack(batch) if self.packing else batch, self.average)


class ReplacingCollator:
    """A collator whose batch fails for no sample: one that cannot be encoded is replaced by another of its source.

    The batch has one more entry, `skipped`, if samples were skipped.
    """

    def __init__(self, collate: SteadyCollator, stream: SampleStream) -> None:
        self.collate, self.stream = collate, stream

    def __call__(self, samples: Sequence[TrainingSample]) -> dict[str, Any]:
        try:
            batch = self.collate(samples)
        except Exception:  # whatever it is, it must not end the run
            samples = self._replaced(samples, [])  # a sample's own fault does not depend on the others of its batch
            if self._fault(samples) is not None:
                samples = [*samples[:1], *self._replaced(samples[1:], samples[:1])]
            batch = self.collate(samples)
        skipped = [one for sample in samples for one in sample.skipped]
        return {**batch, "skipped": skipped} if skipped else batch

    def _replaced(
        self, samples: Sequence[TrainingSample], others: Sequence[TrainingSample]
    ) -> Sequence[TrainingSample]:
        """The samples, those that cannot be collated with `others` replaced."""
        usable = []
        for sample in samples:
            while (error := self._fault([*others, sample])) is not None:
                sample = self.stream.instead_of(sample, error)
            usable.append(sample)
        return usable

    def _fault(self, samples: Sequence[TrainingSample]) -> Exception | None:
        try:
            self.collate(samples)
        except Exception as error:
            return error
        return None


class LoadedBatches:
    """Iterates over a loader. Measures and limits how long it waits, and takes the skipped samples out of the batches.

    A read from a network file system may never end. A batch that takes longer than `timeout` seconds is an `OSError`.
    """

    def __init__(self, loader: DataLoader[Any], stream: SampleStream, timeout: float) -> None:
        loader.timeout = PATIENCE if loader.num_workers else 0
        self.batches: Iterator[dict[str, Any]] = iter(loader)
        self.positions = iter(loader.batch_sampler or ())  # of the samples of each batch
        self.has_workers = loader.num_workers > 0
        self.stream, self.timeout = stream, timeout
        self.seconds = 0.0  # waited since the last `take`
        self.skipped: list[Skipped] = []  # since the last `take`

    def __iter__(self) -> LoadedBatches:
        return self

    def __next__(self) -> dict[str, Any]:
        start, positions = time.perf_counter(), next(self.positions, [])
        try:
            batch = self._next_in_time()
        except TimeoutError:
            samples = ", ".join(map(self.stream.describe, positions))
            raise OSError(
                f"not read after {self.timeout:g} s, half of run.timeout: {samples}; is the file system there? If it "
                "is only slow, raise run.timeout"
            ) from None
        except Exception as error:
            if (line := _of_worker(error)) is None:
                raise
            raise OSError(line) from error
        self.seconds += time.perf_counter() - start
        self.skipped += batch.pop("skipped", ())
        return batch

    def _next_in_time(self) -> dict[str, Any]:
        """The next batch; a `TimeoutError` if there is none in time."""
        if not self.has_workers:
            return in_time(partial(next, self.batches), self.timeout)
        end = time.monotonic() + self.timeout
        while True:
            try:
                return next(self.batches)
            except RuntimeError as error:  # after `PATIENCE` seconds
                if not str(error).startswith("DataLoader timed out"):
                    raise
                if time.monotonic() >= end:
                    raise TimeoutError from error

    def __enter__(self) -> LoadedBatches:
        return self

    def __exit__(self, *_: object) -> None:
        """End the loader's workers. They do not receive the SIGTERM that torch would send to busy ones."""
        for worker in multiprocessing.active_children():
            worker.kill()
        # Not later: in a garbage collection, torch's clean-up and Python's would close the same pipes.
        self.batches = iter(())

    def take(self) -> tuple[float, list[Skipped]]:
        """The seconds and the skipped samples since the last call."""
        taken = self.seconds, self.skipped
        self.seconds, self.skipped = 0.0, []
        return taken


def _of_worker(error: Exception) -> str | None:
    """What happened in a loader worker, in one line: torch adds the worker's traceback. None: not in a worker."""
    text = str(error)
    if "Original Traceback" in text:
        return text.rstrip().rpartition("\n")[2].partition(": ")[2]
    torn = isinstance(error, ConnectionError | EOFError | FileNotFoundError)  # while it handed a tensor over
    if torn or text.startswith(("DataLoader worker", "received 0 items of ancdata")):
        return f"a loader worker was killed ({one_line(error)}); if it was for memory, lower data.workers"
    return None


def make_loader(
    config: DataConfig,
    stream: SampleStream,
    backbone: Backbone,
    share: Share,
    steps: int,
    pin_memory: bool,
    done: int = 0,
    average: Average = "sequence",
    packing: bool = False,
) -> DataLoader[Any]:
    """Loads the micro-batches of this process, from the step after `done` on."""
    collate = SteadyCollator(Collator(backbone, config.collator, unit_of_matches(average)), average, packing)
    return DataLoader(
        stream,
        batch_sampler=StreamBatches(share, steps, done),
        collate_fn=ReplacingCollator(collate, stream),
        num_workers=config.workers,
        pin_memory=pin_memory,
        # A fork would copy the threads and the GPU context of this process, which do not survive that.
        multiprocessing_context="forkserver" if config.workers else None,
        worker_init_fn=end_with_trainer if config.workers else None,
    )

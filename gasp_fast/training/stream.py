"""The stream of training samples: which sample is at which position, and which process takes it at which step.

A sample is a function of its position in the stream, and the positions of a step are a function of the step's number.
So the number of steps is all that an exact resume needs to know of the data, and a step has the same samples on one
process and on thirty-two:

    position = step · batch_size + (micro_batch · world_size + rank) · micro_batch_size + place    (all from 0)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from gasp_fast.backbones import Backbone
from gasp_fast.collator import Collator, CollatorConfig, Sample
from gasp_fast.data.mixture import Mixture, Source

from .modality import SteadyCollator
from .optim import OptimisationConfig
from .sources import QAConfig, Samples, ScenesConfig, TrackedScenes, VideoQuestions


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
        if not (self.scenes.root or self.qa.root or self.vqa.root):
            raise ValueError("data names no source; give data.scenes.root, data.qa.root or data.vqa.root")
        if self.workers < 0:
            raise ValueError(f"data.workers = {self.workers} must be 0 or more")


def open_sources(config: DataConfig) -> dict[str, tuple[Samples, float]]:
    """The sources that have a root, with their weights."""
    sources: dict[str, tuple[Samples, float]] = {}
    if config.scenes.root:
        sources["scenes"] = (TrackedScenes(config.scenes), config.scenes.weight)
    if config.qa.root:
        sources["qa"] = (VideoQuestions(config.qa), config.qa.weight)
    if config.vqa.root:
        sources["vqa"] = (VideoQuestions(config.vqa), config.vqa.weight)
    return sources


class SampleStream(Dataset[Sample]):
    """The endless interleaving of the sources, by position. Pickles into loader workers."""

    def __init__(self, config: DataConfig) -> None:
        self.sources = open_sources(config)
        lengths = {name: Source(len(samples), weight) for name, (samples, weight) in self.sources.items()}
        self.mixture = Mixture(lengths, config.seed)

    def __getitem__(self, position: int) -> Sample:
        draw = self.mixture.draw(position)
        return self.sources[draw.source][0].sample(draw.epoch, draw.index, position)

    def describe(self, position: int) -> str:
        """Name the sample at a position, for messages."""
        draw = self.mixture.draw(position)
        return f"{draw.source}[{draw.index}] of epoch {draw.epoch}"

    def length(self, epochs: float) -> int:
        """Positions in `epochs` passes through the first source, which is the scenes if there are scenes."""
        name, source = next(iter(self.mixture.sources.items()))
        only = len(self.mixture.sources) == 1
        return max(1, round(epochs * (source.length if only else self.mixture.positions_of_epoch(name))))


@dataclass(frozen=True)
class Share:
    """This process's share of an optimiser step."""

    rank: int
    world_size: int
    batch_size: int  # of a step, over all processes
    micro_batch_size: int

    def __post_init__(self) -> None:
        once = self.world_size * self.micro_batch_size
        if self.batch_size % once:
            raise ValueError(
                f"train.batch_size = {self.batch_size} does not divide over {self.world_size} processes with "
                f"train.micro_batch_size = {self.micro_batch_size}; use a multiple of {once}"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches of this process in a step."""
        return self.batch_size // (self.world_size * self.micro_batch_size)

    def positions(self, batch: int) -> list[int]:
        """Positions of this process's micro-batch number `batch`, counted from the beginning of the run."""
        step, micro = divmod(batch, self.accumulation)
        start = step * self.batch_size + (micro * self.world_size + self.rank) * self.micro_batch_size
        return list(range(start, start + self.micro_batch_size))


class StreamBatches(Sampler[list[int]]):
    """The micro-batches of one process from after step `done` to step `steps`, as positions in the stream."""

    def __init__(self, share: Share, steps: int, done: int = 0) -> None:
        self.share = share
        self.batches = range(done * share.accumulation, steps * share.accumulation)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.share.positions, self.batches)


def make_loader(
    config: DataConfig,
    stream: SampleStream,
    backbone: Backbone,
    share: Share,
    steps: int,
    pin_memory: bool,
    done: int = 0,
) -> DataLoader[Any]:
    """Loads the micro-batches of this process, from after step `done` on."""
    return DataLoader(
        stream,
        batch_sampler=StreamBatches(share, steps, done),
        collate_fn=SteadyCollator(Collator(backbone, config.collator)),
        num_workers=config.workers,
        pin_memory=pin_memory,
        # A fork would copy the threads and the GPU context of this process, which do not survive that.
        multiprocessing_context="forkserver" if config.workers else None,
    )


def steps_of(train: OptimisationConfig, stream: SampleStream) -> int:
    """Number of optimiser steps of the run."""
    return train.steps if train.steps is not None else max(1, stream.length(train.epochs) // train.batch_size)

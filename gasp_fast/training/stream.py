"""The stream of training samples: which sample stands at which position, and which rank takes it at which step.

Knows the data wing and the collator; no model is run here, no optimiser known. A sample is a function of its position
in the stream, and a step's positions are a function of the step, so nothing has to be saved for an exact resume but
the number of steps, and the same samples make up a step on one process and on thirty-two:

    position = step · batch_size + (micro_step · ranks + rank) · micro_batch_size + place
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
    """What is trained on: one stream that interleaves the sources by weight."""

    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    qa: QAConfig = field(default_factory=QAConfig)
    vqa: QAConfig = field(
        default_factory=QAConfig
    )  # a second source of questions: the baseline of tracks told in words
    collator: CollatorConfig = field(default_factory=CollatorConfig)
    workers: int = 4  # loader processes of each training process; 0: load in the training process
    seed: int = 0  # of the order

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
        """What stands at a position, in words for an error."""
        draw = self.mixture.draw(position)
        return f"{draw.source}[{draw.index}] of epoch {draw.epoch}"

    def samples(self, epochs: float) -> int:
        """Positions in `epochs` walks through the first source: the scenes, where there are scenes."""
        name, source = next(iter(self.mixture.sources.items()))
        only = len(self.mixture.sources) == 1
        return max(1, round(epochs * (source.length if only else self.mixture.positions_of_epoch(name))))


@dataclass(frozen=True)
class Share:
    """This process among all, and how an optimiser step is divided among them."""

    rank: int
    ranks: int
    batch_size: int  # of a step, over all processes
    micro_batch_size: int

    def __post_init__(self) -> None:
        once = self.ranks * self.micro_batch_size
        if self.batch_size % once:
            raise ValueError(
                f"train.batch_size = {self.batch_size} does not divide over {self.ranks} processes with "
                f"train.micro_batch_size = {self.micro_batch_size}; use a multiple of {once}"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches of this process in a step."""
        return self.batch_size // (self.ranks * self.micro_batch_size)

    def positions(self, batch: int) -> list[int]:
        """Of this process's `batch`-th micro-batch since the beginning of the run."""
        step, micro = divmod(batch, self.accumulation)
        start = step * self.batch_size + (micro * self.ranks + self.rank) * self.micro_batch_size
        return list(range(start, start + self.micro_batch_size))


class StreamBatches(Sampler[list[int]]):
    """The micro-batches of one process over a whole run, as positions in the stream."""

    def __init__(self, share: Share, steps: int) -> None:
        self.share, self.steps = share, steps

    def __len__(self) -> int:
        return self.steps * self.share.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        return (self.share.positions(batch) for batch in range(len(self)))


def make_loader(
    config: DataConfig, stream: SampleStream, backbone: Backbone, share: Share, steps: int, pin_memory: bool
) -> DataLoader[Any]:
    return DataLoader(
        stream,
        batch_sampler=StreamBatches(share, steps),
        collate_fn=SteadyCollator(Collator(backbone, config.collator)),
        num_workers=config.workers,
        pin_memory=pin_memory,
        # Not forked: threads and GPU contexts of this process would not survive it.
        multiprocessing_context="forkserver" if config.workers else None,
    )


def steps_of(train: OptimisationConfig, stream: SampleStream) -> int:
    """Optimiser steps of the run."""
    return train.steps if train.steps is not None else max(1, stream.samples(train.epochs) // train.batch_size)

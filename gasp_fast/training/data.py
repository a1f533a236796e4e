"""The stream of training samples: which sample stands at which position, and which rank takes it at which step.

Knows the data wing and the collator; no model is run here, no optimiser known. A sample is a function of its position
in the stream, and a step's positions are a function of the step, so nothing has to be saved for an exact resume but
the number of steps, and the same samples make up a step on one process and on thirty-two:

    position = step · batch_size + (micro_step · ranks + rank) · micro_batch_size + place
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset, Sampler

from gasp_fast.backbones import Backbone, messages_from_record
from gasp_fast.collator import Collator, Sample, geometry_sample
from gasp_fast.data.annotations.cache import AnnotationCache
from gasp_fast.data.mixture import Mixture, Source
from gasp_fast.data.questions.video_qa import VideoQA
from gasp_fast.data.scenes.library import find_scenes, own_name, survey
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import Tracks, build_tracks
from gasp_fast.data.tracks.sequences import SequenceSampler, is_held_out

from .config import DataConfig, OptimisationConfig, QAConfig, ScenesConfig
from .modality import SteadyCollator

MANY = 16  # unreadable sequences in a row: then it is not the sequences
OPEN_FRAMES = 16384  # of the scenes kept open, so tens of megabytes of poses and paths


class Samples(Protocol):
    """A source: so many samples an epoch, each made when it is asked for."""

    def __len__(self) -> int: ...

    def sample(self, epoch: int, index: int, position: int) -> Sample: ...


# ---- sources --------------------------------------------------------------------------------------------------------


class TrackedScenes:
    """Sequences of scenes with their tracks, read from annotations or tracked when they are met."""

    def __init__(self, config: ScenesConfig) -> None:
        self.config = config
        self.root = Path(config.root)
        self.broken: dict[str, str] = {}  # scene -> why it could not be read
        self._scenes: dict[str, Scene] = {}
        if config.annotations:
            self.caches = [AnnotationCache(folder) for folder in config.annotations]
            plan = self.caches[0].plan
            for cache in self.caches[1:]:
                if (cache.plan.scenes, cache.plan.sequences) != (plan.scenes, plan.sequences):
                    raise ValueError(
                        f"{cache.folder} annotates other sequences than {self.caches[0].folder}; annotations that are "
                        "used together must differ in their grid only"
                    )
            self.names, self.sampler, self.epochs = [s.name for s in plan.scenes], plan.sampler, plan.epochs
        else:
            self.caches, self.epochs = [], 0
            entries = []
            for found in survey(self.root, find_scenes(self.root)):
                if isinstance(found, tuple):
                    self.broken[found[0]] = found[1]
                else:
                    entries.append(found)
            if not entries:
                name, reason = next(iter(self.broken.items()))
                raise ValueError(f"data.scenes.root = {config.root!r} has no usable scene; {name}: {reason}")
            self.names = [entry.name for entry in entries]
            self.sampler = SequenceSampler([entry.frames for entry in entries], config.sequences, self.names)
        # By the folder's own name, as `gasp-fast tracks` and `evaluate` do it: wherever the library lies or begins.
        own_names = [own_name(self.root, name) for name in self.names]
        self._kept = [n for n, name in enumerate(own_names) if not is_held_out(name, config.held_out)]
        if not self._kept:
            raise ValueError(
                f"data.scenes.held_out = {config.held_out} leaves none of {len(self.names)} scenes for training; "
                "lower it or add scenes"
            )

    def __len__(self) -> int:
        return len(self._kept) * self.sampler.config.per_scene

    def sample(self, epoch: int, index: int, position: int) -> Sample:
        """The sequence, or the next one whose scene can be read."""
        for attempt in range(min(MANY, len(self))):
            whole = self._whole((index + attempt) % len(self))
            name = self.names[whole // self.sampler.config.per_scene]
            try:
                return geometry_sample(self._scene(name), self._tracks(epoch, whole), position)
            except OSError as error:
                if name not in self.broken:
                    print(f"data.scenes: {name}: {error}", file=sys.stderr)
                self.broken[name] = str(error)
        raise OSError(
            f"data.scenes.root = {self.config.root!r}: no readable sequence in {MANY}; {name}: {self.broken[name]}"
        )

    def _whole(self, index: int) -> int:
        """The number of a training sequence among those of all scenes."""
        kept, place = divmod(index, self.sampler.config.per_scene)
        return self._kept[kept] * self.sampler.config.per_scene + place

    def _tracks(self, epoch: int, whole: int) -> list[Tracks]:
        if self.caches:
            at = (epoch % self.epochs) * len(self.sampler) + whole
            return [cache[at].tracks for cache in self.caches]
        sequence = self.sampler.draw(epoch, whole)
        scene = self._scene(self.names[sequence.scene])
        return [build_tracks(scene, sequence.frames, g, self.config.keep) for g in self.config.grids]

    def _scene(self, name: str) -> Scene:
        if name not in self._scenes:
            scene = open_scene(self.root / name)
            while self._scenes and sum(map(len, self._scenes.values())) + len(scene) > OPEN_FRAMES:
                self._scenes.pop(next(iter(self._scenes)))
            self._scenes[name] = scene
        return self._scenes[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scenes": {}}


class Questions:
    """Video questions as samples without tracks."""

    def __init__(self, config: QAConfig) -> None:
        self.config = config
        self.records = VideoQA(Path(config.root), config.configs)

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, epoch: int, index: int, position: int) -> Sample:
        config = self.config
        found = self.records.sample(index, config.frames, timeout=config.timeout, longest_side=config.longest_side)
        turns = [{"from": turn.speaker, "value": turn.text} for turn in found.record.turns]
        return Sample(frames=list(found.video.frames), messages=messages_from_record(turns), position=position)


def open_sources(config: DataConfig) -> dict[str, tuple[Samples, float]]:
    """The sources that have a root, with their weights."""
    sources: dict[str, tuple[Samples, float]] = {}
    if config.scenes.root:
        sources["scenes"] = (TrackedScenes(config.scenes), config.scenes.weight)
    if config.qa.root:
        sources["qa"] = (Questions(config.qa), config.qa.weight)
    if config.vqa.root:
        sources["vqa"] = (Questions(config.vqa), config.vqa.weight)
    return sources


# ---- the stream -----------------------------------------------------------------------------------------------------


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

"""Sources of training samples: tracked scenes, and questions about videos."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from gasp_fast.backbones import messages_from_record
from gasp_fast.collator import Sample, geometry_sample
from gasp_fast.data.annotations.read import AnnotationReader
from gasp_fast.data.permutation import permuted
from gasp_fast.data.questions.video_qa import VideoQA
from gasp_fast.data.scenes.library import SceneEntry, check_unchanged, find_scenes, folder_name, survey
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import LARGEST_GRID, Tracks, build_tracks
from gasp_fast.data.tracks.sequences import SequenceConfig, SequenceSampler, is_held_out

TRIES = 64  # sequences tried in place of an unreadable one; if none of them can be read, the run stops
OPEN_FRAMES = 16384  # of all scenes that stay open: tens of megabytes of poses and paths


class Samples(Protocol):
    """A source of samples: `len` of them in an epoch, each made on request."""

    def __len__(self) -> int: ...

    def sample(self, epoch: int, index: int, position: int) -> Sample: ...

    def name(self, index: int) -> str:
        """The file and place of a sample, for messages."""


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """Sequences of posed frames with depth, which give tracks."""

    root: str = ""  # folder of scenes; empty: none
    weight: float = 1.0  # relative to the other sources; 0: not read
    annotations: tuple[str, ...] = ()  # folders of `gasp-fast tracks`, of the same sequences; empty: track on the fly
    grids: tuple[int, ...] = (8, 24)  # query points along a side, coarse and fine; for tracking on the fly
    keep: float = 0.5  # share of the tracks to keep; for tracking on the fly
    held_out: float = 0.0  # share of the scenes that is never trained on
    sequences: SequenceConfig = field(default_factory=SequenceConfig)  # for tracking on the fly

    def __post_init__(self) -> None:
        if not self.annotations and not (self.grids and all(1 <= grid <= LARGEST_GRID for grid in self.grids)):
            raise ValueError(
                f"data.scenes.grids = {list(self.grids)} must name at least one grid, each of 1 to {LARGEST_GRID} "
                "points along a side, such as [8, 24]"
            )
        if not 0 < self.keep <= 1:
            raise ValueError(f"data.scenes.keep = {self.keep} is a share of the tracks; give 0 < keep <= 1")
        if not 0 <= self.held_out <= 1:
            raise ValueError(f"data.scenes.held_out = {self.held_out} is a share of the scenes; give 0 to 1")


class TrackedScenes:
    """Sequences of scenes with their tracks, which are read from annotations or computed on the fly."""

    def __init__(self, config: ScenesConfig) -> None:
        self.config = config
        self.root = Path(config.root)
        self.broken: dict[str, str] = {}  # scene -> why it could not be read
        if config.annotations:
            self.caches = [AnnotationReader(folder) for folder in config.annotations]
            for cache in self.caches:
                cache.check_complete()
            settings = self.caches[0].settings
            for cache in self.caches[1:]:
                if (cache.settings.scenes, cache.settings.sequences) != (settings.scenes, settings.sequences):
                    raise ValueError(
                        f"{cache.folder} annotates other sequences than {self.caches[0].folder}; annotations that are "
                        "used together must differ in their grid only"
                    )
            entries, self.sampler, self.epochs = list(settings.scenes), settings.sampler, settings.epochs
        else:
            self.caches, self.epochs = [], 0
            entries = []
            for entry in survey(self.root, find_scenes(self.root)):
                if isinstance(entry, tuple):
                    name, reason = entry
                    self.broken[name] = reason
                else:
                    entries.append(entry)
            if not entries:
                name, reason = next(iter(self.broken.items()))
                raise ValueError(f"data.scenes.root = {config.root!r} has no usable scene; {name}: {reason}")
            if self.broken:
                count = f"{len(self.broken):,} of {len(self.broken) + len(entries):,} scenes"
                name, reason = next(iter(self.broken.items()))
                print(f"{config.root}: skipped {count}; the first, {name}: {reason}", file=sys.stderr)
            names = [entry.name for entry in entries]
            self.sampler = SequenceSampler([entry.frames for entry in entries], config.sequences, names)
        self.names = [entry.name for entry in entries]
        self.open = OpenScenes(self.root, entries={entry.name: entry for entry in entries})
        # By the folder's own name, as in `gasp-fast tracks` and `evaluate`: it is the same wherever the library is.
        folder_names = [folder_name(self.root, name) for name in self.names]
        self._trained = [n for n, name in enumerate(folder_names) if not is_held_out(name, config.held_out)]
        if not self._trained:
            raise ValueError(
                f"data.scenes.held_out = {config.held_out} leaves none of {len(self.names)} scenes for training; "
                "lower it or add scenes"
            )

    def __len__(self) -> int:
        return len(self._trained) * self.sampler.config.per_scene

    def sample(self, epoch: int, index: int, position: int) -> Sample:
        """The sequence `index`; if its scene or its tracks cannot be read, another one in its place.

        The others follow in an order shuffled by `index`: its neighbours are of the same scene and shard.
        """
        others = (permuted(n, len(self), f"instead of {index}") for n in range(min(TRIES, len(self))))
        for sequence in map(self._sequence, chain([index], others)):
            name = self.names[sequence // self.sampler.config.per_scene]
            try:
                return geometry_sample(self.open[name], self._tracks(epoch, sequence), position)
            except (OSError, ValueError) as error:
                if name not in self.broken:
                    print(f"data.scenes: {name}: {error}", file=sys.stderr)
                self.broken[name] = str(error)
        raise OSError(
            f"data.scenes.root = {self.config.root!r}: no readable sequence in {TRIES}; {name}: {self.broken[name]}"
        )

    def name(self, index: int) -> str:
        scene, place = divmod(self._sequence(index), self.sampler.config.per_scene)
        return f"{self.names[scene]}, sequence {place}"

    def _sequence(self, index: int) -> int:
        """The number of a training sequence among those of all scenes, held out ones included."""
        scene, place = divmod(index, self.sampler.config.per_scene)
        return self._trained[scene] * self.sampler.config.per_scene + place

    def _tracks(self, epoch: int, sequence: int) -> list[Tracks]:
        if self.caches:
            at = (epoch % self.epochs) * len(self.sampler) + sequence
            return [cache[at].tracks for cache in self.caches]
        drawn = self.sampler.draw(epoch, sequence)
        scene = self.open[self.names[drawn.scene]]
        return [build_tracks(scene, drawn.frames, grid, self.config.keep) for grid in self.config.grids]


class OpenScenes:
    """Scenes of a library by name. They stay open, with at most `frames` frames in all; the oldest closes first."""

    def __init__(
        self, root: Path, frames: float = OPEN_FRAMES, entries: Mapping[str, SceneEntry] | None = None
    ) -> None:
        """A scene with an entry in `entries` must be the scene that the entry describes."""
        self.root, self.frames, self.entries = root, frames, dict(entries or {})
        self.scenes: dict[str, Scene] = {}

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, name: str) -> Scene:
        if name not in self.scenes:
            scene = open_scene(self.root / name)
            if name in self.entries:
                check_unchanged(scene, self.entries[name])
            while self.scenes and sum(map(len, self.scenes.values())) + len(scene) > self.frames:
                self.scenes.pop(next(iter(self.scenes)))
            self.scenes[name] = scene
        return self.scenes[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "scenes": {}}  # loader processes open their own


@dataclass(frozen=True, kw_only=True)
class QAConfig:
    """Questions and answers about videos, in the schema of LLaVA-Video."""

    root: str = ""  # folder of JSON lists; empty: none
    weight: float = 1.0
    configs: tuple[str, ...] = ()  # its sub-folders to read; empty: all
    frames: int = 16  # taken from each video
    longest_side: int | None = None  # shrink frames to this while decoding
    timeout: float = 30.0  # seconds to decode a video

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames = {self.frames} must be at least 1")
        if not self.timeout > 0:
            raise ValueError(f"timeout = {self.timeout} must be above 0 (seconds)")
        if self.longest_side is not None and self.longest_side < 1:
            raise ValueError(f"longest_side = {self.longest_side} must be at least 1 (pixels), or null")


class VideoQuestions:
    """Questions about videos, as samples without tracks."""

    def __init__(self, config: QAConfig) -> None:
        self.config = config
        self.records = VideoQA(Path(config.root), config.configs)
        if skipped := self.records.skipped:
            count = f"{len(skipped):,} of {len(skipped) + len(self.records):,} records"
            print(f"{config.root}: skipped {count}; the first, {skipped[0]}", file=sys.stderr)

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, epoch: int, index: int, position: int) -> Sample:
        config, known = self.config, len(self.records.broken)
        question = self.records.sample(index, config.frames, timeout=config.timeout, longest_side=config.longest_side)
        for reason in list(self.records.broken.values())[known:]:
            print(f"{config.root}: skipped {reason}", file=sys.stderr)
        turns = [{"from": turn.speaker, "value": turn.text} for turn in question.record.turns]
        return Sample(frames=list(question.frames), messages=messages_from_record(turns), position=position)

    def name(self, index: int) -> str:
        return self.records.name(index)

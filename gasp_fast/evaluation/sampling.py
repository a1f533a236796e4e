"""The questions of an evaluation: which frames of which scenes, and where their points really go.

A sequence is an anchor frame and `frames - 1` later ones, at gaps drawn without repetition from 1 to `max_gap`, all
equally likely: one set of sequences answers for PCK at any distance in time. Points lie on a grid of the anchor
frame; the data wing's tracks tell where they are seen again. Scenes take turns, so that each has its equal share.

A function of (seed, scenes, index), like the training sampler: an evaluation resumes where it stopped, and two models
are asked the same questions. Knows scenes and tracks; knows no model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gasp_fast.collator import Sample
from gasp_fast.data.scenes.library import SceneEntry, find_scenes, own_name, survey
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import build_tracks
from gasp_fast.data.tracks.sequences import is_held_out

OPEN_SCENES = 16


@dataclass(frozen=True, kw_only=True)
class QuestionConfig:
    """How many questions, and of what kind."""

    sequences: int = 200
    frames: int = 8
    grid: int = 8  # points along each axis of the anchor frame
    max_gap: int = 24
    keep: float = 1.0  # share of the tracks, by visibility; training keeps the better half, a test asks them all
    held_out: float = 0.0  # only the scenes of the held-out split of that share; 0: all scenes
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise ValueError(f"sequences = {self.sequences}: ask for at least 1")
        if self.frames < 2:
            raise ValueError(f"frames = {self.frames}: a match needs 2 frames")
        if self.max_gap < self.frames - 1:
            raise ValueError(
                f"max_gap = {self.max_gap}: {self.frames} frames need gaps up to {self.frames - 1}; "
                "raise max_gap or lower frames"
            )
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out = {self.held_out}: the share of scenes held out, 0 <= held_out < 1")


class Questions:
    """Sequence `i` of an evaluation: its frames, and the sample that goes to the model."""

    def __init__(self, library: Path, config: QuestionConfig) -> None:
        self.library = library
        self.config = config
        self.scenes = _usable_scenes(library, config)
        self._open = lru_cache(maxsize=OPEN_SCENES)(open_scene)

    def __len__(self) -> int:
        return self.config.sequences

    def scene(self, index: int) -> Scene:
        return self._open(self.library / self.scene_entry(index).name)

    def scene_entry(self, index: int) -> SceneEntry:
        return self.scenes[index % len(self.scenes)]

    def frames(self, index: int) -> tuple[int, ...]:
        """The anchor and later frames, ascending."""
        length = self.scene_entry(index).frames
        draw = random.Random(f"question/{self.config.seed}/{index}")
        reach = min(self.config.max_gap, length - 1)
        gaps = sorted(range(1, reach + 1), key=lambda _: draw.random())[: self.config.frames - 1]
        anchor = int(draw.random() * (length - max(gaps)))
        return (anchor, *sorted(anchor + gap for gap in gaps))

    def sample(self, index: int) -> Sample:
        """Decoded frames and tracks; a sample without tracks if no point of the anchor frame is seen again."""
        scene, frames = self.scene(index), self.frames(index)
        tracks = build_tracks(scene, frames, grid=self.config.grid, keep=self.config.keep)
        return Sample(frames=[scene.image(f) for f in frames], tracks=[tracks] if len(tracks) else [])


def _usable_scenes(library: Path, config: QuestionConfig) -> list[SceneEntry]:
    """As many scenes as there are sequences, or all there are; drawn from the whole library in a seeded order."""
    names = find_scenes(library)
    if config.held_out:
        names = [name for name in names if is_held_out(own_name(library, name), config.held_out)]
    if not names:
        raise ValueError(
            f"held_out = {config.held_out} leaves none of the scenes of {library}; raise it, or give 0 to take all"
        )
    draw = random.Random(f"scenes/{config.seed}")
    usable: list[SceneEntry] = []
    short: list[SceneEntry] = []
    unreadable: list[tuple[str, str]] = []
    for found in survey(library, sorted(names, key=lambda _: draw.random())):
        if not isinstance(found, SceneEntry):
            unreadable.append(found)
        elif found.frames < config.frames:
            short.append(found)
        else:
            usable.append(found)
        if len(usable) == config.sequences:
            break
    if usable:
        return usable
    if short:
        longest = max(entry.frames for entry in short)
        raise ValueError(
            f"{library}: the longest scene has {longest} frames, frames = {config.frames} asked; "
            f"lower --frames to {longest}, or give longer scenes"
        )
    raise ValueError(f"{library}: no scene can be used; the first, {unreadable[0][0]}: {unreadable[0][1]}")

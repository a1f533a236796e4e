"""The evaluation set: sequences of frames with query points whose true positions are known.

A sequence is an anchor frame and `frames - 1` later frames of one scene. Their gaps to the anchor frame are drawn
without replacement from 1 to `max_gap`, all equally likely, so one set measures PCK at every temporal distance. Query
points lie on a grid of the anchor frame; tracks built from depth and poses give their positions in the later frames.
Scenes alternate, so each contributes the same number of sequences.

Sequence `i` depends only on (seed, scenes, i): a stopped evaluation can resume, and all models are evaluated on the
same sequences.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gasp_fast.collator import Sample
from gasp_fast.config.limits import MOST, check_whole
from gasp_fast.data.scenes.library import SceneEntry, find_scenes, folder_name, survey
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import LARGEST_GRID, build_tracks
from gasp_fast.data.tracks.sequences import is_held_out

OPEN_SCENES = 16  # scenes kept open at a time


@dataclass(frozen=True, kw_only=True)
class EvaluationSetConfig:
    """Size and sampling of the evaluation set."""

    sequences: int = 200
    frames: int = 8
    grid: int = 8  # query points along each axis of the anchor frame
    max_gap: int = 24
    keep: float = 1.0  # share of the tracks, by visibility; training keeps the better half, an evaluation all of them
    held_out: float = 0.0  # only the scenes that training with this share holds out; 0: all scenes
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in (("sequences", MOST), ("grid", LARGEST_GRID)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} = {getattr(self, name)}: must lie in 1..{most}")
        if self.frames < 2:
            raise ValueError(f"frames = {self.frames}: a match needs 2 frames")
        check_whole(self, ("max_gap",), most=MOST)
        if self.max_gap < self.frames - 1:
            raise ValueError(
                f"max_gap = {self.max_gap}: {self.frames} frames need gaps up to {self.frames - 1}; "
                "raise max_gap or lower frames"
            )
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out = {self.held_out}: the share of scenes held out, 0 <= held_out < 1")


class EvaluationSet:
    """Sequences by index: the scene, the frame numbers, and the sample for the model."""

    def __init__(self, library: Path, config: EvaluationSetConfig) -> None:
        names = find_scenes(library)
        if names == ["."] and library.is_dir():  # a single scene has the name of its folder, as in a library
            library, names = library.resolve().parent, [library.resolve().name]
        self.library = library
        self.config = config
        self.scenes, self.unreadable = _usable_scenes(library, names, config)  # the latter: names and reasons
        self._open = lru_cache(maxsize=OPEN_SCENES)(open_scene)

    def __len__(self) -> int:
        return self.config.sequences

    def scene_entry(self, index: int) -> SceneEntry:
        return self.scenes[index % len(self.scenes)]

    def scene(self, index: int) -> Scene:
        return self._open(self.library / self.scene_entry(index).name)

    def frames(self, index: int) -> tuple[int, ...]:
        """Frame numbers in the scene: the anchor frame, then the later frames in ascending order."""
        length = self.scene_entry(index).frames
        rng = random.Random(f"question/{self.config.seed}/{index}")
        reach = min(self.config.max_gap, length - 1)
        gaps = sorted(range(1, reach + 1), key=lambda _: rng.random())[: self.config.frames - 1]
        anchor = int(rng.random() * (length - max(gaps)))
        return (anchor, *sorted(anchor + gap for gap in gaps))

    def sample(self, index: int) -> Sample:
        """Decoded frames and tracks; no tracks if no query point is visible in a later frame."""
        scene, frames = self.scene(index), self.frames(index)
        tracks = build_tracks(scene, frames, grid=self.config.grid, keep=self.config.keep)
        return Sample(frames=[scene.image(f) for f in frames], tracks=[tracks] if len(tracks) else [])


def _usable_scenes(
    library: Path, names: list[str], config: EvaluationSetConfig
) -> tuple[list[SceneEntry], list[tuple[str, str]]]:
    """Long enough scenes in a seeded random order, at most one for each sequence, and those that are left out."""
    if config.held_out:
        names = [name for name in names if is_held_out(folder_name(library, name), config.held_out)]
    if not names:
        raise ValueError(
            f"held_out = {config.held_out} leaves none of the scenes of {library}; raise it, or give 0 to take all"
        )
    rng = random.Random(f"scenes/{config.seed}")
    usable: list[SceneEntry] = []
    short: list[SceneEntry] = []
    unreadable: list[tuple[str, str]] = []  # name, reason
    for entry in survey(library, sorted(names, key=lambda _: rng.random())):
        if not isinstance(entry, SceneEntry):
            unreadable.append(entry)
        elif entry.frames < config.frames:
            short.append(entry)
        else:
            usable.append(entry)
        if len(usable) == config.sequences:
            break
    if usable:
        return usable, unreadable + [(entry.name, _too_short(entry, config)) for entry in short]
    if short:
        longest = max(entry.frames for entry in short)
        raise ValueError(
            f"{library}: the longest scene has {longest} frames, but frames = {config.frames}; "
            f"lower frames to {longest}, or give longer scenes"
        )
    raise ValueError(f"{library}: no scene can be used; the first, {unreadable[0][0]}: {unreadable[0][1]}")


def _too_short(entry: SceneEntry, config: EvaluationSetConfig) -> str:
    return f"{entry.frames} frames, fewer than the {config.frames} of a sequence"

"""Reads all depth maps of a scene: which are damaged, and how much depth the others hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gasp_fast.data.scenes.computed_depth import computed_folder
from gasp_fast.data.scenes.depth_maps import marked_unknown, read_stored
from gasp_fast.data.scenes.open import open_scene


@dataclass(frozen=True)
class MapCheck:
    """What reading the maps of a scene, or of several scenes, has shown."""

    maps: int = 0
    known: int = 0  # pixels with a depth, of the maps that are not damaged
    pixels: int = 0
    damaged: tuple[str, ...] = ()  # a line for each such map

    def __add__(self, other: MapCheck) -> MapCheck:
        return MapCheck(
            self.maps + other.maps, self.known + other.known, self.pixels + other.pixels, self.damaged + other.damaged
        )

    def __str__(self) -> str:
        share = f", {self.known / self.pixels:.3f} of their values known" if self.pixels else ""
        return f"{self.maps:,} maps read, {len(self.damaged):,} damaged{share}"


def check_maps(root: Path) -> MapCheck:
    """Reads every map of a scene. Raises if the scene cannot be opened."""
    scene = open_scene(root)
    total = MapCheck()
    for index, frame in enumerate(scene.frames):
        if frame.depth is None:
            continue
        path = frame.depth.path
        try:
            # A map that came with the scene may be coarser than the photograph, empty, or NaN where depth is unknown.
            size = scene.image_size(index) if path.is_relative_to(computed_folder(scene)) else None
            total += _check_map(path, size, frame.depth.unknown)
        except (OSError, ValueError) as error:
            total += MapCheck(maps=1, damaged=(str(error),))
    return total


def _check_map(path: Path, size: tuple[int, int] | None, unknown: tuple[float, ...]) -> MapCheck:
    """Raises for a damaged map; `size` is the (width, height) of a computed one, of which more is known."""
    stored = read_stored(path)
    finite = np.isfinite(stored)
    known = int(np.count_nonzero(finite & (stored > 0) & ~marked_unknown(stored, unknown)))
    if size is not None:
        if stored.shape != size[::-1]:
            shape = f"{stored.shape[1]} x {stored.shape[0]}"
            raise ValueError(f"{path}: has {shape} pixels, its photograph {size[0]} x {size[1]}")
        if not finite.all():
            raise ValueError(f"{path}: {np.count_nonzero(~finite):,} of {stored.size:,} values are not finite")
        if not known:
            raise ValueError(f"{path}: holds no depth")
    return MapCheck(1, known, stored.size)

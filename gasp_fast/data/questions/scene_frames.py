"""The frames of a scene that a record is about: named in the record, and read as those of a training sequence are.

So a question about a sequence shows a model the very pixels that the sequence shows it, all frames, in their order.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gasp_fast.data.errors import shown
from gasp_fast.data.scenes.library import SceneChangedError, folder_name, has_digest
from gasp_fast.data.scenes.open_scenes import OpenScenes
from gasp_fast.data.scenes.scene import MOST_FRAMES
from gasp_fast.data.tracks.sequences import is_held_out

Rectangle = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class SceneFrames:
    """Frames of a scene, in the order in which the questions about them count."""

    scene: str  # its path under the folder of scenes
    digest: str  # of the frame names and poses from which the answers follow
    frames: tuple[int, ...]
    seen: Rectangle  # in pixels of the first frame: what the texts' positions go across, which is what the model sees

    @classmethod
    def from_json(cls, fields: Any) -> SceneFrames:
        """Validates the fields of a record; an invalid one is a `ValueError` in a few words."""
        if not isinstance(fields, dict) or fields.keys() != {"scene", "digest", "frames", "seen"}:
            raise ValueError("names frames of a scene without scene, digest, frames and seen")
        scene, digest, frames, seen = (fields[name] for name in ("scene", "digest", "frames", "seen"))
        if not isinstance(scene, str) or not scene or not isinstance(digest, str):
            raise ValueError(f"scene {shown(scene)} is no path, or its digest {shown(digest)} no text")
        if PurePosixPath(scene).is_absolute() or ".." in PurePosixPath(scene).parts:
            raise ValueError(f"scene {shown(scene)} leads out of its folder")
        if not isinstance(frames, list) or not frames or not all(type(frame) is int for frame in frames):
            raise ValueError(f"frames {shown(frames)} are no list of whole numbers")
        if not 0 <= min(frames) <= max(frames) < MOST_FRAMES or len(frames) > MOST_FRAMES:
            raise ValueError(f"frames {shown(frames)} are outside 0 to {MOST_FRAMES - 1}")
        numbers = isinstance(seen, list) and len(seen) == 4 and all(type(edge) in (int, float) for edge in seen)
        if not numbers or not all(map(math.isfinite, seen)):
            raise ValueError(f"seen {shown(seen)} is not left, top, right and bottom")
        return cls(scene, digest, tuple(frames), tuple(seen))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class FrameReader:
    """Reads the frames that records name from the scenes under a folder. Pickles into loader workers."""

    def __init__(self, library: Path, held_out: float = 0.0) -> None:
        """`held_out` is the share of the scenes that is never trained on."""
        self.library, self.held_out = library, held_out
        self.scenes = OpenScenes(library)
        self._unchanged: set[tuple[str, str]] = set()  # names and digests of scenes that this process has compared

    def leaves_out(self, named: SceneFrames) -> bool:
        return _is_held_out(self.library, named.scene, self.held_out)

    def read(self, named: SceneFrames) -> list[NDArray[np.uint8]]:
        """The photographs `[H, W, 3]`. A scene that is not what it was when the record was made is an error."""
        scene = self.scenes[named.scene]
        if (named.scene, named.digest) not in self._unchanged:
            if not has_digest(scene, named.digest):
                raise SceneChangedError(f"{scene.root}: the scene has changed; make its questions again")
            self._unchanged.add((named.scene, named.digest))
        return [scene.image(frame) for frame in named.frames]

    def size(self, named: SceneFrames) -> tuple[int, int]:
        """(width, height) of the first frame."""
        return self.scenes[named.scene].image_size(named.frames[0])


@lru_cache(maxsize=1 << 16)
def _is_held_out(library: Path, name: str, share: float) -> bool:
    return is_held_out(folder_name(library, name), share)

"""`OpenScenes`: the scenes of a library by name, of which the most recently used stay open."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .library import SceneEntry, check_unchanged
from .open import open_scene
from .scene import Scene

OPEN_BYTES = 32 << 20  # of all scenes that stay open
FRAME_BYTES = 2048  # an upper estimate of what a frame takes in an open scene: camera, paths, names; no pixels


class OpenScenes:
    """Scenes by name. The most recently used stay open, within `limit_bytes`; the last one always does."""

    def __init__(
        self, root: Path, limit_bytes: float = OPEN_BYTES, entries: Mapping[str, SceneEntry] | None = None
    ) -> None:
        """A scene with an entry in `entries` must be the scene that the entry describes."""
        self.root, self.limit_bytes, self.entries = root, limit_bytes, dict(entries or {})
        self._scenes: OrderedDict[str, Scene] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        """Number of open scenes."""
        return len(self._scenes)

    @property
    def held_bytes(self) -> int:
        """An upper estimate of the memory of the open scenes."""
        return sum((len(scene) + len(scene.skipped)) * FRAME_BYTES for scene in self._scenes.values())

    def __getitem__(self, name: str) -> Scene:
        if name not in self._scenes:
            scene = open_scene(self.root / name)
            if name in self.entries:
                check_unchanged(scene, self.entries[name])
            self._scenes[name] = scene
            while len(self._scenes) > 1 and self.held_bytes > self.limit_bytes:
                self._scenes.popitem(last=False)
        self._scenes.move_to_end(name)
        return self._scenes[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scenes": OrderedDict()}  # loader processes open their own

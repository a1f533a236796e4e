"""Opens a scene folder of any known format."""

from __future__ import annotations

import os
from pathlib import Path

from .computed_depth import attach_computed_depth
from .formats import find_format
from .scene import Scene


def open_scene(path: str | os.PathLike[str]) -> Scene:
    """The scene in the folder `path`, in any known format. An unusable scene is a one-line error naming the file."""
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    scene = find_format(root).read(root)
    return scene if scene.has_depth else attach_computed_depth(scene)

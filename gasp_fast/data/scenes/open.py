"""Opens a scene folder of any known format."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from .computed_depth import attach_computed_depth
from .folder import following
from .formats import find_format
from .library_file import place_of
from .scene import Scene


def open_scene(path: str | os.PathLike[str]) -> Scene:
    """The scene in the folder `path`, in any known format. An unusable scene is a one-line error naming the file.

    The path may go through a library file (see `library_file.py`).
    """
    place = place_of(Path(path))
    if not place.root.is_dir():
        raise FileNotFoundError(f"{place.root}: no such folder")
    with following(place.follow_links):
        scene = replace(find_format(place.root).read(place.root), computed_depth=place.computed_depth)
        return scene if scene.has_depth else attach_computed_depth(scene)

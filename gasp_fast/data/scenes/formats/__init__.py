"""The folder formats of scenes.

A format is a module with `NAME`, `FILES` (its files, in words), `detect(root)` and `read(root)`.

`detect` looks for files that only this format has. The table is in the order of trying, most specific first: a DL3DV
folder also contains a COLMAP model. A new format is one more module and one more entry here.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from . import colmap, dl3dv, replica, rgbd, scannet, scannetpp, tum, vggt

FORMATS: tuple[ModuleType, ...] = (vggt, rgbd, scannet, tum, replica, scannetpp, dl3dv, colmap)


def find_format(root: Path) -> ModuleType:
    """The module that reads `root`."""
    for module in FORMATS:
        if module.detect(root):
            return module
    raise ValueError(f"{root}: no scene of a known format here. Looked for {known_files()}. It has {contents(root)}")


def contents(root: Path, most: int = 6) -> str:
    """What is in a folder, so that one sees what is missing there."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(root))
    more = [f"and {len(names) - most:,} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more]) or "nothing"


def known_files() -> str:
    """The files by which each format is recognised, in words."""
    return "; ".join(f"{module.NAME}: {module.FILES}" for module in FORMATS)


def is_scene(root: Path) -> bool:
    return root.is_dir() and any(module.detect(root) for module in FORMATS)

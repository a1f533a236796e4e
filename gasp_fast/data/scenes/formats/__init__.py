"""The folder formats a scene may come in.

A format is a module with `NAME`, `MARKS` (its files, in words), `detect(root)`, `read(root)`, `write(scene, root)`.

Detection looks for the files that only that format has; the table is in the order of trying, most particular first
(a DL3DV folder also contains a COLMAP model). A new format is one more module and one more line here.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from . import colmap, dl3dv, rgbd, vggt

FORMATS: tuple[ModuleType, ...] = (vggt, rgbd, dl3dv, colmap)


def find_format(root: Path) -> ModuleType:
    """The module that reads `root`."""
    for module in FORMATS:
        if module.detect(root):
            return module
    raise ValueError(f"{root}: no scene of a known format here. Looked for {known_marks()}")


def known_marks() -> str:
    """What each format is recognised by, in words."""
    return "; ".join(f"{module.NAME}: {module.MARKS}" for module in FORMATS)


def is_scene(root: Path) -> bool:
    return root.is_dir() and any(module.detect(root) for module in FORMATS)


def format_named(name: str) -> ModuleType:
    for module in FORMATS:
        if name == module.NAME:
            return module
    raise ValueError(f"format {name!r} is unknown; known are {', '.join(module.NAME for module in FORMATS)}")

"""The folder `computed_depth/` that `gasp-fast depth` writes into a scene without depth, or elsewhere with --out.

It holds one map per usable frame, and an `index.json` with the source and the error of each. A frame whose map does not
fit is listed as unusable and has no depth. The maps belong to the undistorted image.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gasp_fast.data.errors import one_line, shown
from gasp_fast.files import read_json, write_atomically

from .depth_maps import DepthFile
from .folder import SceneFolder
from .scene import Scene

FOLDER = "computed_depth"
INDEX = "index.json"
VERSION = 1


@dataclass(frozen=True)
class FrameFit:
    """The map of one frame; `error` is the median of |depth - sparse| / sparse over the frame's sparse points."""

    file: str | None  # None: unusable
    points: int = 0
    error: float | None = None
    reason: str = ""


@dataclass
class DepthIndex:
    """The content of `index.json`."""

    source: str  # "mvs" | "model"
    model: str = ""
    space: str = ""  # of the fit: "depth" | "inverse depth"
    scene: str = ""  # digest of the frames and poses for which it was made; empty in indices written before
    version: int = VERSION
    frames: dict[str, FrameFit] = field(default_factory=dict)

    @property
    def made_by(self) -> str:
        """The source, and the model if there is one."""
        return f"{self.source} {self.model}".rstrip()

    @property
    def usable(self) -> list[str]:
        return [name for name, fit in self.frames.items() if fit.file is not None]


def computed_folder(scene: Scene) -> Path:
    """Where the depth computed for `scene` lies, or will lie."""
    return scene.computed_depth or scene.root / FOLDER


def computed_files(scene: Scene) -> SceneFolder:
    """The files among which it is looked for, without a way out of them."""
    return SceneFolder(scene.computed_depth or scene.root)


def write_index(folder: Path, index: DepthIndex) -> Path:
    """Writes the index beside its maps, atomically."""
    path = folder / INDEX
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asdict(index), indent=1).encode())
    return path


def read_index(path: Path) -> DepthIndex:
    """The content of an `index.json`; a damaged one is a one-line `ValueError`."""
    try:
        stored = read_json(path)
        version = stored["version"]
        frames = {str(name): _frame_fit(fit) for name, fit in stored.pop("frames").items()}
        index = DepthIndex(**stored, frames=frames)
        for value in (index.source, index.model, index.space, index.scene):
            if not isinstance(value, str):
                raise TypeError(f"{shown(value)} is no text")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: damaged; delete it and run gasp-fast depth again ({one_line(error)})") from error
    if version != VERSION:
        raise ValueError(
            f"{path}: version {shown(version)}, this program reads version {VERSION}; run gasp-fast depth again"
        )
    return index


def _frame_fit(stored: dict[str, Any]) -> FrameFit:
    fit = FrameFit(**stored)
    for value, kinds in ((fit.file, str | None), (fit.error, int | float | None), (fit.reason, str)):
        if not isinstance(value, kinds):
            raise TypeError(f"{shown(value)} is no {kinds}")
    return replace(fit, error=None if fit.error is None else float(fit.error))


def attach_computed_depth(scene: Scene) -> Scene:
    """`scene` with the maps of its `computed_depth/`; unchanged if it has no such folder."""
    folder, files = computed_folder(scene), computed_files(scene)
    path = folder / INDEX
    if not files.is_file(files.inside(path)):
        return scene
    index = read_index(path)
    frames = []
    for frame in scene.frames:
        fit = index.frames.get(frame.name)
        if fit is not None and fit.file is not None:
            frame = replace(frame, depth=DepthFile(files.inside(folder / fit.file)))
        frames.append(frame)
    return replace(scene, frames=tuple(frames))

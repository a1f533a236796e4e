"""The folder `computed_depth/` that `gasp-fast depth` leaves in a scene which came without depth.

One map per usable frame and an `index.json` that says how each was made and how well it fits; a frame that does not
fit is listed as unusable and has no depth. The maps are drawn on the undistorted image, as the scene shows it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from .depth_maps import DepthFile, one_line
from .scene import Scene, inside

FOLDER = "computed_depth"
INDEX = "index.json"
VERSION = 1


@dataclass
class FrameFit:
    """How the depth of one frame was won; `error` is the median of |fitted - sparse| / sparse at its points."""

    file: str | None  # None: unusable
    points: int = 0
    error: float | None = None
    reason: str = ""


@dataclass
class DepthIndex:
    """What `index.json` holds."""

    source: str  # "mvs" | "model"
    model: str = ""
    space: str = ""  # what was fitted: "depth" | "inverse depth"
    version: int = VERSION
    frames: dict[str, FrameFit] = field(default_factory=dict)

    @property
    def usable(self) -> list[str]:
        return [name for name, fit in self.frames.items() if fit.file is not None]


def write_index(root: Path, index: DepthIndex) -> Path:
    """Write the index beside its maps, whole or not at all."""
    path = root / FOLDER / INDEX
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(asdict(index), indent=1))
    temporary.replace(path)
    return path


def read_index(path: Path) -> DepthIndex:
    try:
        stored = json.loads(path.read_text())
        version = stored["version"]
        frames = {str(name): FrameFit(**fit) for name, fit in stored.pop("frames").items()}
        index = DepthIndex(**stored, frames=frames)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged; delete it and run gasp-fast depth again ({one_line(error)})") from error
    if version != VERSION:
        raise ValueError(f"{path}: version {version}, this program reads version {VERSION}; run gasp-fast depth again")
    return index


def attach_computed_depth(scene: Scene) -> Scene:
    """`scene` with the maps of its `computed_depth/`, or unchanged where there is no such folder."""
    folder = scene.root / FOLDER
    path = folder / INDEX
    if not path.is_file():
        return scene
    index = read_index(inside(scene.root, path))
    frames = []
    for frame in scene.frames:
        fit = index.frames.get(frame.name)
        if fit is not None and fit.file is not None:
            frame = replace(frame, depth=DepthFile(inside(scene.root, folder / str(fit.file))))
        frames.append(frame)
    return replace(scene, frames=tuple(frames))

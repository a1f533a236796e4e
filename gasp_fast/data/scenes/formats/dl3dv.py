"""`dl3dv`: `transforms.json` as Nerfstudio writes it, photographs in `images_4/` or a similar folder, no depth.

Poses are camera-to-world in Blender axes (x right, y up, z backwards), so the camera's y and z change sign. The
intrinsics are for the `w`, `h` of the JSON; the photographs are usually a quarter of that size. `Scene` removes the
lens distortion `k1, k2, p1, p2`; other lenses are refused. Depth comes from Nerfstudio's `depth_file_path` if the JSON
has it, otherwise from `gasp-fast depth`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gasp_fast.data.errors import shown
from gasp_fast.data.scenes.depth_maps import DepthFile
from gasp_fast.data.scenes.folder import SceneFolder
from gasp_fast.data.scenes.natural_order import natural_key
from gasp_fast.data.scenes.scene import (
    IMAGE_SUFFIXES,
    Frame,
    Scene,
    Skipped,
    build_scene,
    check_frame_count,
    number_of,
    pinhole,
    world_to_camera,
)
from gasp_fast.files import read_json

from . import colmap
from .meta import depth_invalid

NAME = "dl3dv"
JSON_NAME = "transforms.json"
JSON_FOLDERS = (".", "nerfstudio", "colmap")  # the benchmark set has all files one folder further down
FILES = "transforms.json here, in nerfstudio/ or in colmap/"
# images_4 (960 x 540) first: the resolution of the recipe, with a sixteenth of the pixels of the full photographs.
IMAGE_FOLDERS = ("images_4", "images_8", "images_2", "images")
BLENDER_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
PLAIN_CAMERAS = ("OPENCV", "FULL_OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "RADIAL", "SIMPLE_RADIAL")
OTHER_LENS = ("k3", "k4", "k5", "k6")


def detect(root: Path) -> bool:
    return find_json(root) is not None


def find_json(root: Path) -> Path | None:
    candidates = (root / folder / JSON_NAME for folder in JSON_FOLDERS)
    return next((path for path in candidates if path.is_file()), None)


def read(root: Path) -> Scene:
    path = find_json(root)
    if path is None:
        raise ValueError(f"{root}: no {JSON_NAME}")
    files = SceneFolder(root)
    meta = _load(files.inside(path))
    _refuse_other_lenses(path, meta)
    photographs = _Photographs(files, path.parent)
    frames: list[Frame] = []
    skipped: list[Skipped] = []
    for k, entry in enumerate(meta["frames"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("file_path"), str) or not entry["file_path"]:
            raise ValueError(f"{path}: frames[{k}] has no file_path")
        _refuse_other_lenses(path, entry)
        stated = Path(entry["file_path"])
        files.inside(path.parent / stated)  # a path that leaves the scene is refused, not skipped
        key = str(_below_image_folder(stated).with_suffix(""))
        image = photographs.find(stated)
        if image is None:
            skipped.append(Skipped(key, f"{stated} is missing"))
            continue
        values = {**meta, **entry}
        fx, fy, cx, cy, width, height = (
            number_of(path, values, name) for name in ("fl_x", "fl_y", "cx", "cy", "w", "h")
        )
        k1, k2, p1, p2 = (number_of(path, values, name, 0.0) for name in ("k1", "k2", "p1", "p2"))
        frames.append(
            Frame(
                key,
                image,
                pinhole(fx, fy, cx, cy),
                world_to_camera(_matrix(entry.get("transform_matrix")), BLENDER_FROM_OPENCV),
                (int(width), int(height)),
                _depth_file(files, path, values),
                (k1, k2, p1, p2),
            )
        )
    frames.sort(key=lambda frame: natural_key(frame.name))  # the list may be in any order, names follow the video
    sparse = colmap.find_model(root, files) or colmap.find_model(path.parent, files)
    return build_scene(root, NAME, frames, skipped, sparse and sparse[1], files)


def _load(path: Path) -> dict[str, Any]:
    meta = read_json(path)
    if not isinstance(meta, dict) or not isinstance(meta.get("frames"), list) or not meta["frames"]:
        raise ValueError(f"{path}: has no list of frames")
    check_frame_count(path, len(meta["frames"]))
    return meta


def _refuse_other_lenses(path: Path, values: dict[str, Any]) -> None:
    model = values.get("camera_model", "OPENCV")
    bent = [name for name in OTHER_LENS if values.get(name)]
    if model not in PLAIN_CAMERAS or bent or values.get("is_fisheye"):
        what = f"{bent[0]} = {shown(values[bent[0]])}" if bent else f"camera_model {shown(model)}"
        raise ValueError(f"{path}: {what} is not read (only k1, k2, p1, p2 are); undistort the photographs first")


class _Photographs:
    """Finds the photograph for a path in the JSON, in the first resolution that is there; its suffix may differ.

    DL3DV's JSON has images/x.png. On disk is images_4/x.png, beside the JSON, under colmap/, or under the scene's root.
    """

    def __init__(self, files: SceneFolder, base: Path) -> None:
        self.files, self.base = files, base
        bases = dict.fromkeys((base, base / "colmap", files.root, files.root / "colmap"))
        self.folders = [folder / name for folder in bases for name in IMAGE_FOLDERS]
        self.by_stem: dict[Path, dict[str, Path]] = {}  # of each folder that was listed

    def find(self, stated: Path) -> Path | None:
        below, stem = _below_image_folder(stated).parent, stated.stem
        for folder in self.folders:
            place = folder / below
            if place not in self.by_stem:
                paths = (place / name for name in self.files.names(place))
                self.by_stem[place] = {path.stem: path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES}
            if stem in self.by_stem[place]:
                return self.files.inside(self.by_stem[place][stem])
        direct = self.base / stated
        return self.files.inside(direct) if self.files.is_file(direct) else None


def _below_image_folder(stated: Path) -> Path:
    return stated.relative_to(stated.parts[0]) if len(stated.parts) > 1 else stated


def _depth_file(files: SceneFolder, path: Path, values: dict[str, Any]) -> DepthFile | None:
    stated = values.get("depth_file_path")
    if not isinstance(stated, str) or not stated:
        return None
    depth = files.inside(path.parent / stated)
    scale = number_of(path, values, "depth_unit_scale_factor", 1e-3) if depth.suffix.lower() == ".png" else 1.0
    unknown = depth_invalid(path, values)
    return DepthFile(depth, scale, distorted=True, unknown=unknown) if files.is_file(depth) else None


def _matrix(transform: object) -> np.ndarray:
    try:
        return np.array(transform, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.full((4, 4), np.nan)  # `build_scene` names the fault

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
from gasp_fast.data.scenes.scene import (
    IMAGE_SUFFIXES,
    Frame,
    Scene,
    Skipped,
    build_scene,
    check_frame_count,
    inside,
    number_of,
    pinhole,
    world_to_camera,
)
from gasp_fast.files import read_json

from . import colmap

NAME = "dl3dv"
JSON_NAME = "transforms.json"
JSON_FOLDERS = (".", "nerfstudio", "colmap")  # the benchmark set has all files one folder further down
FILES = "transforms.json here, in nerfstudio/ or in colmap/"
# images_4 (960 x 540) first: the resolution of the recipe, with a sixteenth of the pixels of the full photographs.
IMAGE_FOLDERS = ("images_4", "images_8", "images_2", "images")
BLENDER_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
PLAIN_CAMERAS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "RADIAL", "SIMPLE_RADIAL")
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
    meta = _load(inside(root, path))
    _refuse_other_lenses(path, meta)
    listings: dict[Path, dict[str, Path]] = {}
    frames: list[Frame] = []
    skipped: list[Skipped] = []
    for k, entry in enumerate(meta["frames"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("file_path"), str) or not entry["file_path"]:
            raise ValueError(f"{path}: frames[{k}] has no file_path")
        _refuse_other_lenses(path, entry)
        stated = Path(entry["file_path"])
        inside(root, path.parent / stated)  # a path that leaves the scene is refused, not skipped
        key = str(_below_image_folder(stated).with_suffix(""))
        image = _find_image(root, path.parent, stated, listings)
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
                _depth_file(root, path, values),
                (k1, k2, p1, p2),
            )
        )
    sparse = colmap.find_model(root) or colmap.find_model(path.parent)
    return build_scene(root, NAME, frames, skipped, sparse_model=sparse and sparse[1])


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


def _find_image(root: Path, base: Path, stated: Path, listings: dict[Path, dict[str, Path]]) -> Path | None:
    """The photograph for the path `stated` in the JSON, in the first resolution found; its suffix may differ.

    DL3DV's JSON has images/x.png. On disk is images_4/x.png, beside the JSON, under colmap/, or under the scene's root.
    """
    tail = _below_image_folder(stated)
    for folder in dict.fromkeys((base, base / "colmap", root, root / "colmap")):
        for name in IMAGE_FOLDERS:
            place = (folder / name / tail).parent
            if place not in listings:
                files = sorted(place.iterdir()) if place.is_dir() else []
                listings[place] = {file.stem: file for file in files if file.suffix.lower() in IMAGE_SUFFIXES}
            if stated.stem in listings[place]:
                return inside(root, listings[place][stated.stem])
    direct = base / stated
    return inside(root, direct) if direct.is_file() else None


def _below_image_folder(stated: Path) -> Path:
    return stated.relative_to(stated.parts[0]) if len(stated.parts) > 1 else stated


def _depth_file(root: Path, path: Path, values: dict[str, Any]) -> DepthFile | None:
    stated = values.get("depth_file_path")
    if not isinstance(stated, str) or not stated:
        return None
    depth = inside(root, path.parent / stated)
    scale = number_of(path, values, "depth_unit_scale_factor", 1e-3) if depth.suffix.lower() == ".png" else 1.0
    return DepthFile(depth, scale, distorted=True) if depth.is_file() else None


def _matrix(transform: object) -> np.ndarray:
    try:
        return np.array(transform, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.full((4, 4), np.nan)  # `build_scene` names the fault

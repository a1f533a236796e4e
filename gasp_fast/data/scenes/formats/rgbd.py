"""`rgbd`: `color/KEY.jpg`, `depth/KEY.png`, `pose/KEY.txt` (4x4 camera-to-world), `intrinsics.txt`, `meta.json`.

The layout of ScanNet exports and of most RGB-D recorders. OpenCV axes; one camera for all frames, for the size of the
colour images; depth in 16 bits, in units of 1 / `depth_scale` of `meta.json` (by default 1000: millimetres).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gasp_fast.data.errors import one_line
from gasp_fast.data.scenes.depth_maps import DepthFile
from gasp_fast.data.scenes.scene import (
    IMAGE_SUFFIXES,
    Frame,
    Scene,
    Skipped,
    build_scene,
    check_frame_count,
    image_size,
    inside,
    number_of,
    world_to_camera,
)
from gasp_fast.files import read_json

NAME = "rgbd"
FILES = "color/, pose/ and intrinsics.txt"
SMALLEST_SCALE = 1e-12  # its inverse is still a number in float32
DEPTH_SUFFIXES = (".png", ".npy", ".exr")


def detect(root: Path) -> bool:
    return (root / "color").is_dir() and (root / "pose").is_dir() and (root / "intrinsics.txt").is_file()


def read(root: Path) -> Scene:
    meta = _meta(root)
    scale = 1.0 / _depth_scale(root, meta)
    intrinsics = _matrix(inside(root, root / "intrinsics.txt"))[:3, :3]
    images = sorted(path for path in (root / "color").iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"{root / 'color'}: no image")
    check_frame_count(root / "color", len(images))
    depths = {path.stem: path for path in sorted((root / "depth").glob("*")) if path.suffix.lower() in DEPTH_SUFFIXES}
    camera_size = image_size(inside(root, images[0]))
    frames: list[Frame] = []
    skipped: list[Skipped] = []
    for image in images:
        pose_file = root / "pose" / f"{image.stem}.txt"
        if not pose_file.is_file():
            skipped.append(Skipped(image.stem, f"{pose_file} is missing"))
            continue
        camera_to_world = _matrix(inside(root, pose_file))
        if camera_to_world.shape != (4, 4):
            raise ValueError(f"{pose_file}: a pose is a 4x4 matrix, this file holds {camera_to_world.shape}")
        depth = depths.get(image.stem)
        # PNG stores depth in units of 1 / depth_scale, the float formats in the scene's own unit.
        depth_file = DepthFile(depth, scale if depth.suffix.lower() == ".png" else 1.0) if depth else None
        frames.append(Frame(image.stem, image, intrinsics, world_to_camera(camera_to_world), camera_size, depth_file))
    orphans = set(depths) - {image.stem for image in images}
    skipped += [Skipped(name, "depth without an image") for name in sorted(orphans)]
    return build_scene(root, NAME, frames, skipped)


def _meta(root: Path) -> dict[str, Any]:
    path = root / "meta.json"
    if not path.is_file():
        return {}
    meta = read_json(inside(root, path))
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: holds {type(meta).__name__}, not an object")
    return meta


def _depth_scale(root: Path, meta: dict[str, Any]) -> float:
    scale = number_of(root / "meta.json", meta, "depth_scale", 1000.0)
    if scale < SMALLEST_SCALE:
        raise ValueError(f"{root / 'meta.json'}: depth_scale = {scale:g}; it is the number of units per metre, above 0")
    return scale


def _matrix(path: Path) -> np.ndarray:
    try:
        matrix = np.array([line.split() for line in path.read_text().splitlines() if line.strip()], dtype=np.float64)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a matrix of numbers: {one_line(error)}") from error
    if matrix.ndim != 2 or min(matrix.shape) < 3:
        raise ValueError(f"{path}: not a 3x3 or 4x4 matrix, its shape is {matrix.shape}")
    return matrix

"""`replica`: the renderings of Replica that NICE-SLAM and its followers use.

    traj.txt  results/frame000000.jpg ...  results/depth000000.png ...  cam_params.json here or beside the scenes

`traj.txt` has one camera-to-world matrix a line, in OpenCV axes, in the order of the frames' numbers. `cam_params.json`
has `camera: {fx, fy, cx, cy, scale}`, `scale` being the stored units of depth in a metre. It counts pixel centres from
0, ours from 0.5.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gasp_fast.data.errors import one_line
from gasp_fast.data.scenes.depth_maps import DepthFile
from gasp_fast.data.scenes.folder import SceneFolder
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

from .meta import META, SMALLEST_SCALE, depth_invalid, read_meta
from .pose_files import with_suffix

NAME = "replica"
FILES = "traj.txt and results/"
CAMERA = "cam_params.json"
IMAGE, DEPTH = "frame", "depth"  # what the names of the files begin with


def detect(root: Path) -> bool:
    return (root / "traj.txt").is_file() and (root / "results").is_dir()


def read(root: Path) -> Scene:
    files = SceneFolder(root)
    intrinsics, unit = _camera(files)
    poses = _trajectory(files.inside(root / "traj.txt"))  # [N, 4, 4]
    unknown = depth_invalid(root / META, read_meta(files))
    images = _by_number(with_suffix(files, root / "results", IMAGE_SUFFIXES), IMAGE)
    depths = _by_number(with_suffix(files, root / "results", (".png",)), DEPTH)
    if not images:
        raise ValueError(f"{root / 'results'}: no {IMAGE}*.jpg")
    check_frame_count(root / "results", len(images))
    if len(images) != len(poses):
        raise ValueError(f"{root / 'traj.txt'}: has {len(poses)} poses for {len(images)} photographs in results/")
    frames = []
    for (number, image), pose in zip(images.items(), poses, strict=True):
        depth = DepthFile(depths[number], unit, unknown=unknown) if number in depths else None
        frames.append(Frame(number, image, intrinsics, world_to_camera(pose), depth=depth))
    skipped = [Skipped(number, "depth without an image") for number in depths if number not in images]
    return build_scene(root, NAME, frames, skipped, files=files)


def _camera(files: SceneFolder) -> tuple[np.ndarray, float]:
    """The intrinsics, and the scene's unit in one stored unit of depth."""
    here, beside = files.root / CAMERA, files.root.absolute().parent / CAMERA
    path = here if files.is_file(files.inside(here)) else beside
    if not path.is_file():
        raise ValueError(f"{files.root}: no {CAMERA} here or in the folder above; copy it from Replica's download")
    content = read_json(path)
    camera = content.get("camera") if isinstance(content, dict) else None
    if not isinstance(camera, dict):
        raise ValueError(f"{path}: has no object camera")
    fx, fy, cx, cy, scale = (number_of(path, camera, name) for name in ("fx", "fy", "cx", "cy", "scale"))
    if scale < SMALLEST_SCALE:
        raise ValueError(f"{path}: scale = {scale:g}; it is the number of units per metre, above 0")
    return pinhole(fx, fy, cx + 0.5, cy + 0.5), 1.0 / scale


def _trajectory(path: Path) -> np.ndarray:  # float64 [N, 4, 4]
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
        check_frame_count(path, len(lines))
        return np.array(lines, np.float64).reshape(len(lines), 4, 4)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not lines of 16 numbers: {one_line(error)}") from error


def _by_number(paths: list[Path], prefix: str) -> dict[str, Path]:
    return {path.stem.removeprefix(prefix): path for path in paths if path.stem.startswith(prefix)}

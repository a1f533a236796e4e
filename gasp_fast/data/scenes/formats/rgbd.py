"""`rgbd`: `color/KEY.jpg`, `depth/KEY.png`, `pose/KEY.txt` (4x4 camera-to-world), `intrinsics.txt`, `meta.json`.

The layout of ScanNet exports and of most RGB-D recorders. OpenCV axes; one camera for all frames, for the size of the
colour images; depth in 16 bits, in units of 1 / `depth_scale` of `meta.json` (by default 1000: millimetres).

Poses of one file a frame take as many calls to the file system as there are frames. `poses.txt` holds all of them, one
line a frame: KEY and the 16 numbers, row by row. Where it exists, the files in `pose/` are not read. `pack_poses`
writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gasp_fast.data.errors import one_line, shown
from gasp_fast.data.scenes.depth_maps import DepthFile
from gasp_fast.data.scenes.folder import SceneFolder
from gasp_fast.data.scenes.scene import (
    IMAGE_SUFFIXES,
    Frame,
    Scene,
    Skipped,
    build_scene,
    check_frame_count,
    image_size,
    number_of,
    world_to_camera,
)
from gasp_fast.files import read_json, write_atomically

NAME = "rgbd"
FILES = "color/, pose/ (or poses.txt) and intrinsics.txt"
POSES = "poses.txt"
SMALLEST_SCALE = 1e-12  # its inverse is still a number in float32
DEPTH_SUFFIXES = (".png", ".npy", ".exr")


def detect(root: Path) -> bool:
    return (
        (root / "color").is_dir()
        and ((root / "pose").is_dir() or (root / POSES).is_file())
        and (root / "intrinsics.txt").is_file()
    )


def read(root: Path) -> Scene:
    files = SceneFolder(root)
    scale = 1.0 / _depth_scale(root, _meta(files))
    intrinsics = _matrix(files.inside(root / "intrinsics.txt"))[:3, :3]
    images = _with_suffix(files, root / "color", IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"{root / 'color'}: no image")
    check_frame_count(root / "color", len(images))
    depths = {path.stem: path for path in _with_suffix(files, root / "depth", DEPTH_SUFFIXES)}
    camera_size = image_size(files.inside(images[0]))
    packed = _packed_poses(root / POSES) if files.is_file(files.inside(root / POSES)) else None
    frames: list[Frame] = []
    skipped: list[Skipped] = []
    for image in images:
        pose_file = root / "pose" / f"{image.stem}.txt"
        if packed is not None:
            camera_to_world = packed.get(image.stem)
            missing = f"{root / POSES} has no pose of it"
        else:
            camera_to_world = _pose(files.inside(pose_file)) if files.is_file(pose_file) else None
            missing = f"{pose_file} is missing"
        if camera_to_world is None:
            skipped.append(Skipped(image.stem, missing))
            continue
        depth = depths.get(image.stem)
        # PNG stores depth in units of 1 / depth_scale, the float formats in the scene's own unit.
        depth_file = DepthFile(depth, scale if depth.suffix.lower() == ".png" else 1.0) if depth else None
        frames.append(Frame(image.stem, image, intrinsics, world_to_camera(camera_to_world), camera_size, depth_file))
    orphans = set(depths) - {image.stem for image in images}
    skipped += [Skipped(name, "depth without an image") for name in sorted(orphans)]
    return build_scene(root, NAME, frames, skipped, files=files)


def pack_poses(root: Path) -> None:
    """Writes `poses.txt` from the files in `pose/`, with their numbers as they are. Without such files it stays."""
    files = SceneFolder(root)
    lines = []
    for path in _with_suffix(files, root / "pose", (".txt",)):
        _pose(files.inside(path))  # raises unless it is a pose
        lines.append(" ".join([path.stem, *path.read_text().split()]))
    if lines:
        write_atomically(root / POSES, ("\n".join(lines) + "\n").encode(errors="surrogateescape"))


def _packed_poses(path: Path) -> dict[str, np.ndarray]:
    """The poses in `poses.txt`, by key."""
    poses: dict[str, np.ndarray] = {}
    for number, line in enumerate(path.read_bytes().decode(errors="surrogateescape").split("\n"), 1):
        if not line.strip():
            continue
        key, *numbers = line.rsplit(maxsplit=16)
        try:
            pose = np.array(numbers, np.float64).reshape(4, 4)
        except ValueError:
            raise ValueError(f"{path}: line {number} is not a key and 16 numbers") from None
        if key in poses:
            raise ValueError(f"{path}: line {number} is the second pose of {shown(key)}")
        poses[key] = pose
    check_frame_count(path, len(poses))
    return poses


def _pose(path: Path) -> np.ndarray:  # float64 [4, 4]
    pose = _matrix(path)
    if pose.shape != (4, 4):
        raise ValueError(f"{path}: a pose is a 4x4 matrix, this file holds {pose.shape}")
    return pose


def _with_suffix(files: SceneFolder, folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    paths = (folder / name for name in files.names(folder))
    return [path for path in paths if path.suffix.lower() in suffixes]


def _meta(files: SceneFolder) -> dict[str, Any]:
    path = files.root / "meta.json"
    if not files.is_file(files.inside(path)):
        return {}
    meta = read_json(path)
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

"""`tum`: a sequence of the TUM RGB-D benchmark.

    rgb.txt  depth.txt  groundtruth.txt  rgb/*.png  depth/*.png

The three lists hold a time stamp a line, with a path below the scene, or with `tx ty tz qx qy qz qw` (camera-to-world,
OpenCV axes). A photograph takes the depth map and the pose that are nearest in time, within `NEAR` seconds. Depth is in
units of 1 / 5000 m, and lies on the photographs.

The intrinsics are those of the benchmark for `freiburg3`, whose photographs have no distortion. For all others, write
`intrinsics.txt` (3x3) for undistorted photographs; it counts pixel centres from 0 as the benchmark does, ours from 0.5.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gasp_fast.data.errors import one_line
from gasp_fast.data.scenes.depth_maps import DepthFile
from gasp_fast.data.scenes.folder import SceneFolder
from gasp_fast.data.scenes.scene import (
    Frame,
    Scene,
    Skipped,
    build_scene,
    check_frame_count,
    pinhole,
    world_to_camera,
)

from .meta import META, depth_invalid, depth_scale, read_meta
from .pose_files import read_matrix

NAME = "tum"
FILES = "rgb.txt and groundtruth.txt"
NEAR = 0.02  # seconds, as in the benchmark's own tool
FREIBURG3 = (535.4, 539.2, 320.1, 247.6)
MOST_LINES = 1 << 20  # of a list; poses come at 100 to 500 a second


def detect(root: Path) -> bool:
    return (root / "rgb.txt").is_file() and (root / "groundtruth.txt").is_file()


def read(root: Path) -> Scene:
    files = SceneFolder(root)
    meta = read_meta(files)
    unit, unknown = 1.0 / depth_scale(root, meta, 5000.0), depth_invalid(root / META, meta)
    intrinsics = _intrinsics(files)
    taken, images = _stamped(files, "rgb.txt", 1)
    check_frame_count(root / "rgb.txt", len(images))
    known, poses = _stamped(files, "groundtruth.txt", 7)
    has_depth = files.is_file(root / "depth.txt")
    measured, depths = _stamped(files, "depth.txt", 1) if has_depth else (np.zeros(0), [])
    frames: list[Frame] = []
    skipped: list[Skipped] = []
    for time, (name,) in zip(taken, images, strict=True):
        image = files.inside(root / name)
        pose = _nearest(known, time)
        if pose is None or not files.is_file(image):
            why = f"{image} is missing" if pose is not None else f"no pose within {NEAR} s"
            skipped.append(Skipped(image.stem, why))
            continue
        at = _nearest(measured, time)
        depth = None if at is None else files.inside(root / depths[at][0])
        depth_file = DepthFile(depth, unit, unknown=unknown) if depth and files.is_file(depth) else None
        camera_to_world = _matrix([float(value) for value in poses[pose]])
        frames.append(Frame(image.stem, image, intrinsics, world_to_camera(camera_to_world), depth=depth_file))
    return build_scene(root, NAME, frames, skipped, files=files)


def _intrinsics(files: SceneFolder) -> np.ndarray:
    path = files.root / "intrinsics.txt"
    if files.is_file(files.inside(path)):
        matrix = read_matrix(path)[:3, :3]
        matrix[:2, 2] += 0.5
        return matrix
    if "freiburg3" not in files.root.resolve().name:
        raise ValueError(
            f"{path}: missing; the photographs of freiburg1 and freiburg2 are distorted: undistort them and write the "
            "3x3 matrix (525 0 319.5, 0 525 239.5, 0 0 1 is the approximation that the benchmark gives for all)"
        )
    fx, fy, cx, cy = FREIBURG3
    return pinhole(fx, fy, cx + 0.5, cy + 0.5)


def _stamped(files: SceneFolder, name: str, values: int) -> tuple[np.ndarray, list[list[str]]]:
    """The time stamps of a list, ascending, and the `values` words after each."""
    path = files.inside(files.root / name)
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        if len(lines) > MOST_LINES:
            raise ValueError(f"over {MOST_LINES:,} lines")
        if any(len(line) != 1 + values for line in lines):
            raise ValueError(f"not lines of a time stamp and {values} values")
        stamps = np.array([float(line[0]) for line in lines])
        if values > 1:
            np.array([line[1:] for line in lines], np.float64)  # raises unless these are numbers
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    order = np.argsort(stamps, kind="stable")
    return stamps[order], [lines[k][1:] for k in order]


def _nearest(stamps: np.ndarray, time: float) -> int | None:
    """The index of the stamp nearest to `time`, if it is near enough."""
    if not len(stamps):
        return None
    after = int(np.searchsorted(stamps, time))
    near = min((k for k in (after - 1, after) if 0 <= k < len(stamps)), key=lambda k: float(abs(stamps[k] - time)))
    return near if abs(stamps[near] - time) <= NEAR else None


def _matrix(pose: list[float]) -> np.ndarray:  # float64 [4, 4]
    """From `tx ty tz qx qy qz qw`; an invalid quaternion gives NaN, which `build_scene` names."""
    centre, quaternion = np.array(pose[:3]), np.array(pose[3:])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        x, y, z, w = quaternion / np.linalg.norm(quaternion)
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, 3] = centre
    return matrix

"""`vggt`: `images/`, `depths/*.exr`, `image_names.json`, `cam_from_worlds.npy`, `intrinsics.npy`.

The layout in which VGGT's authors publish scenes: three lists of equal length, in the same order. World-to-camera,
OpenCV axes, `[N, 3, 4]` or `[N, 4, 4]`; intrinsics for the stored images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gasp_fast.data.errors import reading
from gasp_fast.data.scenes.depth_maps import DepthFile
from gasp_fast.data.scenes.folder import SceneFolder
from gasp_fast.data.scenes.scene import Frame, Scene, Skipped, build_scene, check_frame_count
from gasp_fast.files import read_json

from .meta import META, depth_invalid, read_meta

NAME = "vggt"
FILES = "image_names.json, cam_from_worlds.npy and intrinsics.npy"
DEPTH_SUFFIXES = (".exr", ".npy")


def detect(root: Path) -> bool:
    return all((root / name).is_file() for name in ("image_names.json", "cam_from_worlds.npy", "intrinsics.npy"))


def read(root: Path) -> Scene:
    files = SceneFolder(root)
    names = _names(files.inside(root / "image_names.json"))
    poses = _array(files.inside(root / "cam_from_worlds.npy"), len(names), ((3, 4), (4, 4)))
    intrinsics = _array(files.inside(root / "intrinsics.npy"), len(names), ((3, 3),))
    if poses.shape[1] == 3:
        last = np.broadcast_to(np.array([0.0, 0.0, 0.0, 1.0]), (len(names), 1, 4))
        poses = np.concatenate([poses, last], axis=1)
    unknown = depth_invalid(root / META, read_meta(files))
    frames: list[Frame] = []
    skipped: list[Skipped] = []
    for k, name in enumerate(names):
        image = files.inside(root / "images" / name)
        key = str(Path(name).with_suffix(""))
        if not files.is_file(image):
            skipped.append(Skipped(key, f"{image} is missing"))
            continue
        candidates = [files.inside(root / "depths" / f"{key}{suffix}") for suffix in DEPTH_SUFFIXES]
        depth = next((DepthFile(path, unknown=unknown) for path in candidates if files.is_file(path)), None)
        frames.append(Frame(key, image, intrinsics[k], poses[k], depth=depth))
    return build_scene(root, NAME, frames, skipped, files=files)


def _names(path: Path) -> list[str]:
    """The file names in `image_names.json`."""
    names = read_json(path)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and Path(name).name for name in names):
        raise ValueError(f"{path}: not a list of file names")
    check_frame_count(path, len(names))
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: a name occurs twice")
    return names


def _array(path: Path, count: int, shapes: tuple[tuple[int, int], ...]) -> np.ndarray:  # float64 [count, *shape]
    with reading(path, "array"):
        array = np.array(np.load(path, mmap_mode="r", allow_pickle=False), dtype=np.float64)
    if array.ndim != 3 or array.shape[1:] not in shapes:
        expected = " or ".join(f"[N, {rows}, {columns}]" for rows, columns in shapes)
        raise ValueError(f"{path}: has shape {list(array.shape)}, not {expected}")
    if len(array) != count:
        raise ValueError(f"{path}: has {len(array)} entries for {count} names in image_names.json")
    return array

"""Reads a COLMAP sparse model through pycolmap into plain arrays.

pycolmap does not check its input: with a damaged count in a binary model it reads without end or allocates all memory.
So the files are checked first, record by record, and pycolmap reads only a model whose records fill its files exactly.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gasp_fast.data.errors import one_line
from gasp_fast.data.scenes.folder import SceneFolder
from gasp_fast.data.scenes.lens import NO_DISTORTION, Distortion
from gasp_fast.data.scenes.natural_order import natural_key
from gasp_fast.data.scenes.scene import pinhole

# Where each camera model has fx, fy, cx, cy and k1, k2, p1, p2 among its parameters; None: 0.
_CAMERA_MODELS: dict[str, tuple[tuple[int, int, int, int], tuple[int | None, ...]]] = {
    "SIMPLE_PINHOLE": ((0, 0, 1, 2), (None, None, None, None)),
    "PINHOLE": ((0, 1, 2, 3), (None, None, None, None)),
    "SIMPLE_RADIAL": ((0, 0, 1, 2), (3, None, None, None)),
    "RADIAL": ((0, 0, 1, 2), (3, 4, None, None)),
    "OPENCV": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "FULL_OPENCV": ((0, 1, 2, 3), (4, 5, 6, 7)),
}
_MUST_BE_ZERO = {"FULL_OPENCV": ("k3", "k4", "k5", "k6")}  # the parameters after those above
_REQUIRED = ("cameras", "images", "points3D")


@dataclass(frozen=True)
class ModelImage:
    """One registered photograph."""

    name: str  # path below the image folder
    size: tuple[int, int]  # (width, height) for which the intrinsics hold
    intrinsics: np.ndarray  # float64 [3, 3]
    distortion: Distortion
    pose: np.ndarray  # float64 [4, 4], world-to-camera
    points: np.ndarray | None = None  # float64 [n, 3], world positions of the points it observes; only on request


def has_model(files: SceneFolder, folder: Path) -> bool:
    return any(all(files.is_file(folder / f"{part}{suffix}") for part in _REQUIRED) for suffix in (".bin", ".txt"))


def check_model_files(files: SceneFolder, folder: Path) -> None:
    """Raises unless all files of a model lie in the scene and are regular: pycolmap would open a pipe and wait."""
    for name in files.names(folder):
        path = files.inside(folder / name)
        if path.exists() and not (files.is_file(path) or files.is_dir(path)):
            raise OSError(f"{path}: not a regular file")


def read_model(folder: Path, with_points: bool = False) -> list[ModelImage]:
    """The registered images of the model in `folder`, in the order of their names."""
    import pycolmap

    if (folder / "cameras.bin").is_file():
        for stem, after_record in _AFTER_RECORD.items():
            path = folder / f"{stem}.bin"
            if path.is_file():
                _check_records(path, after_record)
    try:
        model = pycolmap.Reconstruction(str(folder))
        return sorted(_images(model, folder, with_points), key=lambda image: natural_key(image.name))
    except UnsupportedCameraError:
        raise
    except Exception as error:  # pycolmap raises RuntimeError, IndexError and more
        raise OSError(f"{folder}: cannot read COLMAP model: {one_line(error)}") from error


class UnsupportedCameraError(ValueError):
    """The camera model is not a pinhole with the distortion k1, k2, p1, p2."""


def _images(model: Any, folder: Path, with_points: bool) -> list[ModelImage]:
    images = []
    for image in model.images.values():
        if not image.has_pose:
            continue
        camera = model.cameras[image.camera_id]
        if camera.model_name not in _CAMERA_MODELS:
            raise UnsupportedCameraError(
                f"{folder}: camera model {camera.model_name} of {image.name} is not read; undistort the photographs "
                "first: colmap image_undistorter"
            )
        further = _MUST_BE_ZERO.get(camera.model_name, ())
        for name, value in zip(further, camera.params[8:], strict=True):
            if value != 0:
                raise UnsupportedCameraError(
                    f"{folder}: camera model {camera.model_name} of {image.name} has {name} = {value:g}, which is not "
                    "read (only k1, k2, p1, p2 are); undistort the photographs first: colmap image_undistorter"
                )
        focal_and_centre, lens = _CAMERA_MODELS[camera.model_name]
        fx, fy, cx, cy = (float(camera.params[k]) for k in focal_and_centre)
        k1, k2, p1, p2 = (0.0 if k is None else float(camera.params[k]) for k in lens)
        pose = np.vstack([image.cam_from_world().matrix(), [0.0, 0.0, 0.0, 1.0]])
        points = None
        if with_points:
            seen = [point.point3D_id for point in image.points2D if point.has_point3D()]
            points = np.array([model.points3D[k].xyz for k in seen]).reshape(-1, 3)
        distortion = (k1, k2, p1, p2) if any((k1, k2, p1, p2)) else NO_DISTORTION
        size = (int(camera.width), int(camera.height))
        images.append(ModelImage(image.name, size, pinhole(fx, fy, cx, cy), distortion, pose, points))
    return images


# ---- checking the binary files --------------------------------------------------------------------------------------
# Each function takes the file and the offset of one record, and returns the offset of the next. struct.error: the
# record runs over the end of the file.

_COUNT = struct.Struct("<Q")
_PARAMETERS = {0: 3, 1: 4, 2: 4, 3: 5, 4: 8, 5: 8, 6: 12, 7: 5, 8: 4, 9: 5, 10: 12}  # by COLMAP's model id


def _after_camera(data: bytes, at: int) -> int:
    _, model, _, _ = struct.unpack_from("<IiQQ", data, at)
    if model not in _PARAMETERS:  # the length of its record is unknown
        raise ValueError(f"camera model number {model} is not read; undistort first: colmap image_undistorter")
    return at + 24 + 8 * _PARAMETERS[model]


def _after_image(data: bytes, at: int) -> int:
    end_of_name = data.find(b"\0", at + 64)
    if end_of_name < 0:
        raise ValueError("an image name does not end")
    (points,) = _COUNT.unpack_from(data, end_of_name + 1)
    return int(end_of_name + 9 + 24 * points)


def _after_point(data: bytes, at: int) -> int:
    (length,) = _COUNT.unpack_from(data, at + 43)
    return int(at + 51 + 8 * length)


def _after_rig(data: bytes, at: int) -> int:
    _, sensors = struct.unpack_from("<II", data, at)
    at += 8 + (8 if sensors else 0)
    for _ in range(sensors - 1):
        (has_pose,) = struct.unpack_from("<B", data, at + 8)
        at += 9 + (56 if has_pose else 0)
    return at


def _after_frame(data: bytes, at: int) -> int:
    (members,) = struct.unpack_from("<I", data, at + 64)
    return int(at + 68 + 16 * members)


_AFTER_RECORD: dict[str, Callable[[bytes, int], int]] = {
    "cameras": _after_camera,
    "images": _after_image,
    "points3D": _after_point,
    "rigs": _after_rig,
    "frames": _after_frame,
}


def _check_records(path: Path, after_record: Callable[[bytes, int], int]) -> None:
    """Raises unless the file is a record count followed by exactly that many records."""
    data = path.read_bytes()
    try:
        (count,) = _COUNT.unpack_from(data, 0)
        at = _COUNT.size
        for _ in range(count):
            at = after_record(data, at)
            if at > len(data):
                raise ValueError("a record runs over the end")
    except (struct.error, ValueError) as error:
        raise OSError(f"{path}: damaged COLMAP file: {one_line(error)}") from error
    if at != len(data):
        raise OSError(f"{path}: damaged COLMAP file: {len(data) - at} bytes after the last record")

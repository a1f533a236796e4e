"""`Scene`: photographs with their cameras and depth maps.

A `Scene` is a table of `Frame`s; pixels are decoded on access. `open.py` reads a scene from a folder. Conventions, the
same everywhere in this project: OpenCV axes (x right, y down, z forward), world-to-camera poses, pixel centres at
integer + 0.5, depth along z with 0 for unknown.

A `Scene` returns undistorted images only: a distorted photograph becomes the pinhole photograph with the same
intrinsics (`lens.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np

from gasp_fast.data.errors import reading, shown
from gasp_fast.data.images import open_image

from .depth_maps import DepthFile, read_depth, resampled
from .folder import SceneFolder
from .frame_cache import DECODED
from .lens import NO_DISTORTION, Distortion, undistort

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST_FRAMES = 1 << 15  # of a scene: 18 minutes of video at 30 frames a second
LARGEST_SIDE = 1 << 16  # pixels of a side of the image for which intrinsics hold; JPEG ends there
# Largest difference of R R^T from the identity: poses stored as text with six digits stay below 1e-4.
ROTATION_TOLERANCE = 1e-3
_LAST_ROW, _IDENTITY = np.array([0.0, 0.0, 0.0, 1.0]), np.eye(3)


@dataclass(frozen=True)
class Frame:
    """One photograph: its files and its camera, nothing decoded yet."""

    name: str
    image: Path
    intrinsics: np.ndarray  # float64 [3, 3], for an image of `camera_size`
    pose: np.ndarray  # float64 [4, 4], world-to-camera
    camera_size: tuple[int, int] | None = None  # (width, height); None: the image's own
    depth: DepthFile | None = None
    distortion: Distortion = NO_DISTORTION


@dataclass(frozen=True)
class Skipped:
    """A frame of the folder that cannot be used, and why."""

    name: str
    reason: str


@dataclass
class Scene:
    """Frames in order, decoded lazily. Thread-safe; pickles into loader workers."""

    root: Path
    format: str
    frames: tuple[Frame, ...]
    skipped: tuple[Skipped, ...] = ()
    sparse_model: Path | None = None  # folder of a COLMAP model of the same world, if there is one
    computed_depth: Path | None = None  # folder of depth computed for it; None: `computed_depth/` in the scene
    _sizes: dict[int, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def frame_names(self) -> list[str]:
        return [frame.name for frame in self.frames]

    @property
    def has_depth(self) -> bool:
        return any(frame.depth is not None for frame in self.frames)

    def image_size(self, i: int) -> tuple[int, int]:
        """(width, height) of the colour image, from its header."""
        i = self._index(i)
        if i not in self._sizes:
            self._sizes[i] = image_size(self.frames[i].image)
        return self._sizes[i]

    def image(self, i: int) -> np.ndarray:  # uint8 [H, W, 3]
        """The undistorted photograph, as a copy that the caller may change."""
        i = self._index(i)
        frame = self.frames[i]
        key = ("image", *_stamp(frame.image), frame.distortion, frame.intrinsics.tobytes(), frame.camera_size)
        return DECODED.get(key, lambda: self._decode_image(i)).copy()

    def depth(self, i: int) -> np.ndarray:  # float32 [h, w]
        """Depth along z, finite, 0 where unknown. The map may be coarser than the image. Read-only."""
        i = self._index(i)
        frame = self.frames[i]
        if frame.depth is None:
            if not self.has_depth:
                raise ValueError(f"{self.root}: this scene has no depth; make it with: gasp-fast depth {self.root}")
            width, height = self.image_size(i)
            return np.zeros((height, width), np.float32)
        key = ("depth", *_stamp(frame.depth.path), frame.depth, frame.distortion, frame.intrinsics.tobytes())
        return DECODED.get(key, lambda: self._decode_depth(i))

    def intrinsics(self, i: int) -> np.ndarray:  # float64 [3, 3]
        """The pinhole camera of the undistorted image, in its pixels."""
        frame = self.frames[self._index(i)]
        if frame.camera_size is None:
            return frame.intrinsics.copy()
        width, height = self.image_size(i)
        scale = np.array([width / frame.camera_size[0], height / frame.camera_size[1], 1.0])
        return frame.intrinsics * scale[:, None]

    def pose(self, i: int) -> np.ndarray:  # float64 [4, 4]
        return self.frames[self._index(i)].pose.copy()

    def read_ahead(self, frames: Sequence[int], images: bool = True, depth: bool = True, threads: int = 4) -> None:
        """Decodes several frames in parallel into the process's cache; the decoders release the interpreter's lock."""
        readers = [self.image] * images + [self.depth] * (depth and self.has_depth)
        with ThreadPool(threads) as pool:  # not an executor: one of its threads that never ends would block the exit
            for job in [pool.apply_async(read, [i]) for i in frames for read in readers]:
                job.get()

    def _index(self, i: int) -> int:
        if not -len(self.frames) <= i < len(self.frames):
            raise IndexError(f"frame {i} of {self.root}, which has {len(self.frames)} frames")
        return i % len(self.frames)

    def _decode_image(self, i: int) -> np.ndarray:
        frame = self.frames[i]
        with reading(frame.image, "image"), open_image(frame.image) as image:
            pixels = np.array(image.convert("RGB"))
        if frame.distortion != NO_DISTORTION:
            pixels = undistort(pixels, self.intrinsics(i), frame.distortion, smooth=True)
        return pixels

    def _decode_depth(self, i: int) -> np.ndarray:
        frame = self.frames[i]
        assert frame.depth is not None
        depth = read_depth(frame.depth.path, frame.depth.scale, frame.depth.unknown)
        if frame.depth.camera is not None:
            depth = resampled(depth, frame.depth.camera, self.intrinsics(i), self.image_size(i))
        if frame.depth.distorted and frame.distortion != NO_DISTORTION:
            width, height = self.image_size(i)
            scale = np.array([depth.shape[1] / width, depth.shape[0] / height, 1.0])
            depth = undistort(depth, self.intrinsics(i) * scale[:, None], frame.distortion, smooth=False)
        return depth

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sizes": {}}


# ---- used by all readers --------------------------------------------------------------------------------------------


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) from the header of an image file."""
    with reading(path, "image"), open_image(path) as image:
        return image.size


def number_of(path: Path, values: dict[str, Any], name: str, default: float | None = None) -> float:
    """The finite number under `name` in the content of the JSON file `path`."""
    value = values.get(name, default)
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # JSON has integers of any length
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{path}: {name} = {shown(value)} is not a number")
    return number


def check_frame_count(path: Path, count: int) -> None:
    """Called before any work on each frame, which for millions of frames would take minutes without a word."""
    if count > MOST_FRAMES:
        raise ValueError(f"{path}: {count:,} frames; a scene has at most {MOST_FRAMES:,}; divide it into several")


def build_scene(
    root: Path,
    format: str,
    frames: Sequence[Frame],
    skipped: Sequence[Skipped] = (),
    sparse_model: Path | None = None,
    files: SceneFolder | None = None,
) -> Scene:
    """The last step of every reader: refuses paths outside the root, skips and counts frames with an invalid camera.

    Camera trackers write NaN poses for frames they lost, so one invalid pose must not cost the scene. No usable frame
    at all is an error. `files` are the listings that the reader has made already.
    """
    files = files or SceneFolder(root)
    usable: list[Frame] = []
    lost = list(skipped)
    for frame in frames:
        files.inside(frame.image)
        if frame.depth is not None:
            files.inside(frame.depth.path)
        fault = pose_fault(frame.pose) or intrinsics_fault(frame.intrinsics) or size_fault(frame.camera_size)
        if fault:
            lost.append(Skipped(frame.name, fault))
        else:
            usable.append(frame)
    if not usable:
        why = f"; the first, {lost[0].name}: {lost[0].reason}" if lost else ""
        raise ValueError(f"{root}: no usable frame among {len(lost)} ({format}){why}")
    return Scene(root, format, tuple(usable), tuple(lost), sparse_model)


def pose_fault(pose: np.ndarray) -> str | None:
    """Why `pose` is not a rigid motion, or None."""
    if pose.shape != (4, 4):
        return f"pose has shape {pose.shape}, not 4x4"
    if not np.isfinite(pose).all():
        return "pose is not finite"
    if np.abs(pose[3] - _LAST_ROW).max() > ROTATION_TOLERANCE:
        return f"last row of the pose is {pose[3].tolist()}, not 0 0 0 1"
    rotation = pose[:3, :3]
    with np.errstate(over="ignore", invalid="ignore"):
        off = np.abs(rotation @ rotation.T - _IDENTITY).max()
        mirrored = np.linalg.det(rotation) < 0
    if not off <= ROTATION_TOLERANCE:
        return f"pose is no rotation (R R^T is off by {off:.2g})"
    return "pose mirrors (its determinant is -1)" if mirrored else None


def intrinsics_fault(matrix: np.ndarray) -> str | None:
    """Why `matrix` is not a pinhole camera without skew, or None."""
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        return f"intrinsics are not a finite 3x3 matrix: {matrix.tolist()}"
    if matrix[0, 0] <= 0 or matrix[1, 1] <= 0:
        return f"focal length {matrix[0, 0]:g}, {matrix[1, 1]:g} is not positive"
    if np.abs(matrix - pinhole(matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2])).max() > 1e-6:
        return "intrinsics have skew or a last row other than 0 0 1; only pinhole cameras are read"
    return None


def size_fault(size: tuple[int, int] | None) -> str | None:
    """Why `size` is not that of the image for which intrinsics hold, or None."""
    if size is None or 1 <= min(size) <= max(size) <= LARGEST_SIDE:
        return None
    return f"camera has size {size[0]:g} x {size[1]:g}; a side has 1 to {LARGEST_SIDE:,} pixels"


def rigid_inverse(pose: np.ndarray) -> np.ndarray:
    """Camera-to-world from world-to-camera, and back.

    The plain inverse, not R^T: rotations stored with six digits are not quite orthogonal, and the inverse of the file's
    matrix should be our pose to the last digits.
    """
    inverse: np.ndarray = np.linalg.inv(pose)
    inverse[3] = (0.0, 0.0, 0.0, 1.0)
    return inverse


def world_to_camera(camera_to_world: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:  # float64 [4, 4]
    """The pose; `axes` converts from OpenCV's axes. An invalid matrix stays as it is: `build_scene` names the fault."""
    if pose_fault(camera_to_world):
        return camera_to_world
    return rigid_inverse(camera_to_world if axes is None else camera_to_world @ axes)


def camera_centre(pose: np.ndarray) -> np.ndarray:  # float64 [3]
    """The position of the camera with the world-to-camera `pose`, in world coordinates."""
    return -pose[:3, :3].T @ pose[:3, 3]


def without_depth(scene: Scene) -> Scene:
    """The same scene without its depth maps."""
    return replace(scene, frames=tuple(replace(frame, depth=None) for frame in scene.frames))


def pinhole(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:  # float64 [3, 3]
    return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def _stamp(path: Path) -> tuple[str, int, int]:
    """Identifies the content of a file: a rewritten file must not be served from the cache."""
    status = path.stat()
    return str(path), status.st_mtime_ns, status.st_size

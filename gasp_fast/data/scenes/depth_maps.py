"""Reads depth maps: `.npy`, 16-bit `.png` with a scale, `.exr`, COLMAP's `.geometric.bin` and `.photometric.bin`.

Every format gives a float32 array `[h, w]`, finite, with 0 for unknown. Unknown are values that are not finite or not
above 0, the largest value of 16-bit files (65535, which depth cameras write where they measure nothing, or nothing that
near), and the values that the scene names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gasp_fast.data.errors import reading
from gasp_fast.data.images import check_size, open_image


class PinholeCamera(NamedTuple):
    """In pixels of the image it belongs to."""

    fx: float
    fy: float
    cx: float
    cy: float


@dataclass(frozen=True)
class DepthFile:
    """The depth file of a frame."""

    path: Path
    scale: float = 1.0  # the scene's units in one stored unit
    distorted: bool = False  # pixels are those of the distorted photograph, not of the undistorted image
    unknown: tuple[float, ...] = ()  # further stored values that mean unknown
    camera: PinholeCamera | None = None  # of the map, at the place of the photograph's; None: it shows the same


def read_depth(path: Path, scale: float = 1.0, unknown: tuple[float, ...] = ()) -> np.ndarray:
    """The map in `path` times `scale`; 0 where depth is unknown. A bad file is a one-line `OSError`."""
    stored = read_stored(path)
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged value may overflow: it becomes unknown
        depth = stored.astype(np.float32)
        if scale != 1.0:
            depth *= np.float32(scale)
    depth[~(np.isfinite(depth) & (depth > 0)) | marked_unknown(stored, unknown)] = 0.0
    return depth


def marked_unknown(stored: np.ndarray, values: tuple[float, ...] = ()) -> np.ndarray:  # bool [h, w]
    """Where `stored` holds one of `values`, or the largest value of its 16 bits."""
    if stored.dtype.kind in "iu" and stored.dtype.itemsize == 2:
        values = (*values, np.iinfo(stored.dtype).max)
    marked = np.zeros(stored.shape, bool)
    with np.errstate(over="ignore"):  # a value beyond the range of float16
        for value in values:
            marked |= stored == value
    return marked


def resampled(
    depth: np.ndarray, camera: PinholeCamera, intrinsics: np.ndarray, size: tuple[int, int]
) -> np.ndarray:  # [h, w]
    """What another camera at the same place sees, with as many pixels: each takes the nearest one of `depth`.

    `intrinsics` [3, 3] are those of the other camera for an image of `size` (width, height).
    """
    height, width = depth.shape
    x = ((np.arange(width) + 0.5) * (size[0] / width) - intrinsics[0, 2]) / intrinsics[0, 0]
    y = ((np.arange(height) + 0.5) * (size[1] / height) - intrinsics[1, 2]) / intrinsics[1, 1]
    column = np.floor(x * camera.fx + camera.cx).clip(-1, width).astype(np.intp)
    row = np.floor(y * camera.fy + camera.cy).clip(-1, height).astype(np.intp)
    seen = ((row >= 0) & (row < height))[:, None] & ((column >= 0) & (column < width))
    values = depth[row.clip(0, height - 1)[:, None], column.clip(0, width - 1)]
    return np.where(seen, values, np.float32(0))


def read_stored(path: Path) -> np.ndarray:  # [h, w]
    """The values in `path` as they are stored. A bad file is a one-line `OSError`."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: unknown depth format {path.suffix!r}; readable are {', '.join(_READERS)}")
    with reading(path, "depth"):
        stored = reader(path)
    if stored.ndim != 2 or 0 in stored.shape:
        raise OSError(f"{path}: a depth map has two axes, this file holds shape {stored.shape}")
    return stored


def _read_npy(path: Path) -> np.ndarray:
    # Memory mapping compares the size in the header with that of the file before it allocates anything.
    stored = np.load(path, mmap_mode="r", allow_pickle=False)
    if stored.dtype.kind not in "fiu":
        raise ValueError(f"holds {stored.dtype}, not numbers")
    stored = stored[..., 0] if stored.ndim == 3 and stored.shape[-1] == 1 else stored
    if stored.ndim == 2:
        check_size(*stored.shape[::-1])
    return stored


def _read_png(path: Path) -> np.ndarray:
    with open_image(path, ("PNG",)) as image:
        if image.mode not in ("I;16", "I;16B", "I"):
            raise ValueError(f"a depth image has one channel of 16 bits, this one is {image.mode}")
        return np.asarray(image).astype(np.uint16)  # Pillow has no other integers in these modes of a PNG


def _read_exr(path: Path) -> np.ndarray:
    import OpenEXR

    with OpenEXR.File(str(path), separate_channels=True, header_only=True, num_threads=0) as file:
        low, high = file.header()["dataWindow"]
        check_size(*(int(n) for n in high.astype(np.int64) - low + 1))
    with OpenEXR.File(str(path), separate_channels=True, num_threads=0) as file:
        channels = file.channels()
        # Depth tools write Z, V or Y, or three equal channels.
        for name in ("Z", "V", "Y", "R", *sorted(channels)):
            if name in channels:
                return np.array(channels[name].pixels)
    raise ValueError("no channel")


def _read_colmap(path: Path) -> np.ndarray:
    """COLMAP's format: the text `width&height&channels&`, then float32, row by row for one channel."""
    with open(path, "rb") as file:
        head = file.read(64)
        fields = head.split(b"&", 3)
        if len(fields) != 4:
            raise ValueError("does not begin with width&height&channels&")
        width, height, channels = (int(field) for field in fields[:3])
        check_size(width, height)
        if channels != 1:
            raise ValueError(f"holds {channels} channels; a normal map, not a depth map?")
        file.seek(len(head) - len(fields[3]))
        pixels = np.fromfile(file, "<f4", count=width * height)
    if pixels.size != width * height:
        raise ValueError(f"holds {pixels.size} of {width * height} pixels")
    return pixels.reshape(height, width)


_READERS = {".npy": _read_npy, ".png": _read_png, ".exr": _read_exr, ".bin": _read_colmap}

"""Reads depth maps: `.npy`, 16-bit `.png` with a scale, `.exr`, COLMAP's `.geometric.bin` and `.photometric.bin`.

Every format gives a float32 array `[h, w]`, finite, with 0 for unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gasp_fast.data.errors import reading
from gasp_fast.data.images import check_size, open_image


@dataclass(frozen=True)
class DepthFile:
    """The depth file of a frame."""

    path: Path
    scale: float = 1.0  # the scene's units in one stored unit
    distorted: bool = False  # pixels are those of the distorted photograph, not of the undistorted image


def read_depth(path: Path, scale: float = 1.0) -> np.ndarray:
    """The map in `path` times `scale`; negative and non-finite values become 0. A bad file is a one-line `OSError`."""
    stored = read_stored(path)
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged value may overflow: it becomes unknown
        depth = stored.astype(np.float32)
        if scale != 1.0:
            depth *= np.float32(scale)
    depth[~(np.isfinite(depth) & (depth > 0))] = 0.0
    return depth


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
        return np.asarray(image)


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

"""Writes frames as an mp4 file that any player and any trainer reads. Same frames, same bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray


def write_clip(path: Path, frames: Sequence[NDArray[np.uint8]], fps: int = 4, quality: int = 20) -> None:
    """H.264 with `quality` as its constant rate factor (0 lossless, 20 near it, 28 visibly worse), atomically.

    H.264 wants even sides: an odd last row or column is dropped.
    """
    if not len(frames):
        raise ValueError(f"{path}: a clip needs at least one frame")
    height, width = (side // 2 * 2 for side in frames[0].shape[:2])
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial.mp4")
    try:
        with av.open(str(partial), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            # x264's macroblock tree reads memory that nobody wrote: with it, one clip in ten has other bytes.
            options = {"crf": str(quality), "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
            stream = container.add_stream("libx264", rate=fps, options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for frame in frames:
                pixels = np.ascontiguousarray(frame[:height, :width])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

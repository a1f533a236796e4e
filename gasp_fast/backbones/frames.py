"""The frames of a sequence, and the forms in which a model can get them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

RGBImage = NDArray[np.uint8]  # [H, W, 3]
FramesAs = Literal["images", "video_pairs", "video_doubled"]
# How many frames share a grid of tokens. `qwen_vl.py` explains the forms; other families have only the first.
FRAMES_PER_GRID: dict[FramesAs, int] = {"images": 1, "video_pairs": 2, "video_doubled": 1}


def check_frames(frames: Sequence[RGBImage], sequence: int) -> None:
    for index, frame in enumerate(frames):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(
                f"frame {index} of sequence {sequence} is {frame.dtype} {list(frame.shape)}; frames are uint8 [H, W, 3]"
            )


def one_size(frames: Sequence[RGBImage], sequence: int) -> RGBImage:
    """The frames of a video `[F, H, W, 3]`. `sequence` is its number in the batch, for messages."""
    sizes = {f"{frame.shape[1]}x{frame.shape[0]}" for frame in frames}
    if len(sizes) > 1:
        raise ValueError(
            f"sequence {sequence} has frames of sizes {', '.join(sorted(sizes))}; the frames of one video must have "
            "one size, so resize them first"
        )
    return np.stack(list(frames))

"""A part of a photograph, resized: moves pixels, the image, depth and intrinsics together.

All frames of a pack become H x W pixels. Of each photograph the largest part with this aspect ratio is taken and
resized by the same factor along both axes. Its place need not be a whole number of pixels: with pixel centres at
integer + 0.5, a pixel (u, v) of the photograph becomes ((u - left) / step, (v - top) / step).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Crop:
    """A part of a photograph, in its pixels, and what becomes of it."""

    photograph: tuple[int, int]  # (width, height)
    left: float
    top: float
    step: float  # pixels of the photograph in one of the result
    height: int  # of the result
    width: int

    @classmethod
    def largest(
        cls, photograph: tuple[int, int], height: int, width: int, shift: tuple[float, float] = (0.0, 0.0)
    ) -> Crop:
        """The largest part with the ratio `width / height`. `shift` moves it from the middle, by -1 to 1 to an edge."""
        step = min(photograph[0] / width, photograph[1] / height)
        spare = max(0.0, photograph[0] - step * width), max(0.0, photograph[1] - step * height)  # one of them is 0
        left, top = (half * (1 + by) / 2 for half, by in zip(spare, shift, strict=True))
        return cls(photograph, left, top, step, height, width)

    def pixels(self, uv: Float) -> Float:
        """Where pixels `[..., 2]` of the photograph are in the result."""
        return (uv - [self.left, self.top]) / self.step

    def intrinsics(self, matrix: Float) -> Float:
        """The camera `[3, 3]` of the result."""
        moved = matrix - np.array([[0, 0, self.left], [0, 0, self.top], [0, 0, 0]])
        return moved / np.array([[self.step], [self.step], [1]])

    def image(self, photograph: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """`[h, w, 3]` -> `[H, W, 3]`: each pixel is the weighted mean of all that it covers (antialiased)."""
        right = min(self.left + self.step * self.width, self.photograph[0])
        bottom = min(self.top + self.step * self.height, self.photograph[1])
        box = (self.left, self.top, right, bottom)
        return np.asarray(Image.fromarray(photograph).resize((self.width, self.height), Image.Resampling.BICUBIC, box))

    def depth(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """`[h, w]` -> `[H, W]`: the nearest value. The map may have another resolution than the photograph."""
        rows, columns = values.shape
        v = self.top + (np.arange(self.height) + 0.5) * self.step
        u = self.left + (np.arange(self.width) + 0.5) * self.step
        row = np.floor(v * (rows / self.photograph[1])).astype(np.intp).clip(0, rows - 1)
        column = np.floor(u * (columns / self.photograph[0])).astype(np.intp).clip(0, columns - 1)
        return values[row[:, None], column]


def unprojected(depth: NDArray[np.float32], intrinsics: Float) -> Float:
    """Depth `[..., H, W]` and cameras `[..., 3, 3]` -> points `[..., H, W, 3]` in the camera, at centres of pixels."""
    height, width = depth.shape[-2:]
    matrix = intrinsics[..., None, None, :, :]
    x = (np.arange(width) + 0.5 - matrix[..., 0, 2]) / matrix[..., 0, 0]
    y = ((np.arange(height) + 0.5)[:, None] - matrix[..., 1, 2]) / matrix[..., 1, 1]
    return np.stack(np.broadcast_arrays(x * depth, y * depth, depth), axis=-1)

"""Where a frame's visual tokens lie on the frame: the pixel -> token map, and depth averaged over tokens.

Knows rectangles and arrays; must not know a model. What a processor does to a frame (resize each axis, crop, cut into
patches, merge or pool them) always ends in the same thing: some rectangle of the original frame, divided evenly into
columns and rows. A backbone computes the rectangle; everything else follows here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class TokenGrid:
    """`rows x columns` tokens, row by row, over a rectangle of the colour image.

    The rectangle is in pixels of the original image, with pixel centres at integer + 0.5. It may be smaller than the
    image (a crop) or larger (padding).
    """

    columns: int
    rows: int
    left: float
    top: float
    right: float
    bottom: float

    @property
    def tokens(self) -> int:
        return self.columns * self.rows

    def locate(self, uv: ArrayLike) -> NDArray[np.int64]:
        """The token under each point `uv [..., 2]` (x, y), -1 where the point is outside the grid or not a number."""
        uv = np.asarray(uv, dtype=np.float64)
        # Invalid values (NaN, infinity) compare as outside, which is what they are.
        with np.errstate(invalid="ignore"):
            column = np.floor((uv[..., 0] - self.left) * self.columns / (self.right - self.left))
            row = np.floor((uv[..., 1] - self.top) * self.rows / (self.bottom - self.top))
            inside = (column >= 0) & (column < self.columns) & (row >= 0) & (row < self.rows)
            return np.where(inside, row * self.columns + column, -1).astype(np.int64)

    def xy(self) -> NDArray[np.int64]:
        """Column and row of every token, `[tokens, 2]`."""
        row, column = np.divmod(np.arange(self.tokens), self.columns)
        return np.stack([column, row], axis=-1)

    def centres(self) -> NDArray[np.float64]:
        """The pixel position of every token's centre, `[tokens, 2]`."""
        cell = np.array([(self.right - self.left) / self.columns, (self.bottom - self.top) / self.rows])
        return np.array([self.left, self.top]) + (self.xy() + 0.5) * cell

    def pool_depth(self, depth: NDArray[np.floating], image_size: tuple[int, int]) -> NDArray[np.float32]:
        """Mean of the known depths in each token's patch, `[tokens]`; 0 where none is known.

        `depth [h, w]` covers the whole image of `image_size` (width, height) at a resolution of its own; zero, negative
        and non-finite values are unknown. A depth pixel belongs to the token that contains its centre.

        Tokens are axis-aligned boxes, so their sums are differences of running sums along one axis, then the other.
        """
        height, width = depth.shape
        known = np.isfinite(depth) & (depth > 0)
        columns = _first_pixels(self.left, self.right, self.columns, width / image_size[0], width)
        rows = _first_pixels(self.top, self.bottom, self.rows, height / image_size[1], height)
        total = _box_sums(np.where(known, depth, 0.0), columns, rows)  # [rows, columns]
        count = _box_sums(known, columns, rows)
        mean = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
        return mean.astype(np.float32).reshape(-1)


def _first_pixels(start: float, stop: float, cells: int, scale: float, size: int) -> NDArray[np.int64]:
    """Index of the first pixel whose centre is not before each of the `cells + 1` edges; `scale` is pixels per unit."""
    edges = (start + np.arange(cells + 1) * (stop - start) / cells) * scale
    return np.clip(np.ceil(edges - 0.5), 0, size).astype(np.int64)


def _box_sums(values: NDArray, columns: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    down = np.zeros((values.shape[0] + 1, values.shape[1]))
    np.cumsum(values, axis=0, out=down[1:])
    bands = down[rows[1:]] - down[rows[:-1]]  # [rows, width]
    across = np.zeros((bands.shape[0], values.shape[1] + 1))
    np.cumsum(bands, axis=1, out=across[:, 1:])
    return across[:, columns[1:]] - across[:, columns[:-1]]

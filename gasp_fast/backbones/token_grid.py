"""Where a frame's visual tokens lie on the frame: the pixel -> token map.

Knows a rectangle; must not know a model. What a processor does to a frame (resize each axis, crop, cut into
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

    def x_edges(self) -> NDArray[np.float64]:
        """Where the columns begin and end, in pixels, `[columns + 1]`: what depth pooling needs."""
        return np.linspace(self.left, self.right, self.columns + 1)

    def y_edges(self) -> NDArray[np.float64]:
        """Where the rows begin and end, in pixels, `[rows + 1]`."""
        return np.linspace(self.top, self.bottom, self.rows + 1)

"""The pixel -> token map: which visual token covers which pixels of a frame.

A processor resizes each axis of a frame, crops it, cuts it into patches and merges or pools the patches. The result is
always a rectangle of the original frame, divided evenly into columns and rows. `Backbone.frame_grid` computes the
rectangle for a model; `TokenGrid` derives the rest from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class TokenGrid:
    """A grid of `rows x columns` tokens, numbered row by row, over a rectangle of the frame.

    The rectangle is in pixels of the original frame, with pixel centres at integer + 0.5. It can be smaller than the
    frame (a crop) or larger (padding).
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

    @property
    def rectangle(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom: what the model sees of the frame."""
        return self.left, self.top, self.right, self.bottom

    def locate(self, uv: ArrayLike) -> NDArray[np.int64]:
        """The token under each point `uv [..., 2]` (x, y), -1 where the point is outside the grid or not a number."""
        uv = np.asarray(uv, dtype=np.float64)
        # NaN and infinity compare as outside.
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
        """Boundaries of the columns in pixels, `[columns + 1]`."""
        return np.linspace(self.left, self.right, self.columns + 1)

    def y_edges(self) -> NDArray[np.float64]:
        """Boundaries of the rows in pixels, `[rows + 1]`."""
        return np.linspace(self.top, self.bottom, self.rows + 1)

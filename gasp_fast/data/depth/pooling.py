"""Averages depth over the patch of each token, over the pixels with known depth.

The caller gives the patches as edges in pixels of the colour image, which covers any resize or crop.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gasp_fast.data.compiled import Backend, tracks_extension


def pool_depth(
    depth: Sequence[np.ndarray],
    size: Sequence[tuple[int, int]] | np.ndarray,
    x_edges: np.ndarray,
    y_edges: np.ndarray,
    *,
    threads: int = 1,
    backend: Backend = "auto",
) -> np.ndarray:  # float32 [F, rows, columns]
    """Mean known depth of each patch of each map; 0 where a patch has no known pixel.

    `depth` are F maps [h, w] and `size` the (width, height) of their colour images; the edges are in pixels of those.
    A pixel belongs to the patch that contains its centre. The sums are in float64, where they are exact as long as the
    largest and the smallest depth of a patch of n pixels differ by less than a factor 2^29 / n. Their order then
    changes no bit, so both backends agree.
    """
    if len(depth) != len(size):
        raise ValueError(f"size has {len(size)} entries for {len(depth)} depth maps")
    if not len(depth):
        raise ValueError("depth is empty; give at least one map")
    for name, edges in (("x_edges", x_edges), ("y_edges", y_edges)):
        if np.ndim(edges) != 1 or len(edges) < 2 or not (np.diff(edges) >= 0).all():
            raise ValueError(f"{name} = {np.asarray(edges).tolist()}; edges are at least two ascending numbers")
    maps = [np.ascontiguousarray(one, dtype=np.float32) for one in depth]
    columns = np.stack(
        [_first_pixels(x_edges, one.shape[1], width) for one, (width, _) in zip(maps, size, strict=True)]
    )
    rows = np.stack([_first_pixels(y_edges, one.shape[0], height) for one, (_, height) in zip(maps, size, strict=True)])
    extension = tracks_extension(backend)
    if extension is not None:
        pooled: np.ndarray = extension.pool(maps, columns, rows, threads)
        return pooled
    return np.stack([_pool_reference(*one) for one in zip(maps, columns, rows, strict=True)])


def _first_pixels(edges: np.ndarray, pixels: int, length: float) -> np.ndarray:  # int64, ascending, in 0..pixels
    """The first pixel whose centre lies at or after each edge."""
    first = np.ceil(np.asarray(edges, np.float64) * (pixels / length) - 0.5)
    return np.clip(first, 0, pixels).astype(np.int64)


def _pool_reference(depth: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:  # float32 [rows, columns]
    known = np.isfinite(depth) & (depth > 0)
    total = _sum_cells(np.where(known, depth, 0).astype(np.float64), columns, rows)
    count = _sum_cells(known.astype(np.int64), columns, rows)
    return (total / np.maximum(count, 1)).astype(np.float32)


def _sum_cells(values: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Sums over [rows[i], rows[i+1]) x [columns[j], columns[j+1]); an empty range sums to 0."""
    # reduceat reads one row past the last edge and gives values[i] for an empty range: pad, then set those to 0.
    by_row = np.add.reduceat(np.pad(values, ((0, 1), (0, 0))), rows, axis=0)[:-1]
    by_row[np.diff(rows) == 0] = 0
    cells = np.add.reduceat(np.pad(by_row, ((0, 0), (0, 1))), columns, axis=1)[:, :-1]
    cells[:, np.diff(columns) == 0] = 0
    return cells

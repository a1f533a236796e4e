# mypy: disallow-untyped-defs=False
"""The Triton kernels that fold `X`: what is between two anchors is added, so that their gradient is one product.

A similarity between two anchors i and j occurs twice in a block of all rows, as `x_ij` and as `x_ji`. Each contributes
to both gradients: `X_ij` adds `X_ij e_j` to that of i, where i is the row, and `X_ij e_i` to that of j, where j is the
column. Together

    gradient_i = sum over all tokens j of X_ij e_j  +  sum over anchors j of X_ji e_j
               = sum over all tokens j of (X_ij + X_ji) e_j        with X_ji = 0 where j is no anchor

So `add_transposed` writes `X_ij + X_ji` at both places, and `X E` is the whole gradient of the anchors. Tokens that are
no anchors receive `X_ij e_i` only: `gather_columns` copies their columns, which lie between those of anchors, into a
matrix of their own, for the product `X^T E`. With A of n tokens anchors, both products have `A n + (n - A) A` rows
times columns instead of `2 A n`.

The sum is taken in float32 and rounded once, like each of its two numbers before. It is the same number at both places
because addition commutes.
"""

from __future__ import annotations

from .triton_launch import jit, kernel, tl
from .vector_kernels import LARGEST_HALF


@jit
def rounded(total, x, CLAMPED: tl.constexpr):
    if CLAMPED:
        total = tl.clamp(total, -LARGEST_HALF, LARGEST_HALF, propagate_nan=tl.PropagateNan.ALL)
    return total.to(x.dtype.element_ty)


@kernel("x", direct=True)
def add_transposed(
    x, x_g: tl.int64, x_n: tl.int64, own, rows,
    CLAMPED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: a square of pairs of rows on or above the diagonal, and its mirror image.

    No other program touches these. On the diagonal both are the same place, and receive the same numbers.
    """
    first, second = tl.program_id(0), tl.program_id(1)
    if first <= second:
        base = x + tl.program_id(2).to(tl.int64) * x_g
        i = first * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        j = second * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        own_i, own_j = tl.load(own + i, mask=i < rows, other=0), tl.load(own + j, mask=j < rows, other=0)
        mask, mirrored = (i < rows)[:, None] & (j < rows)[None, :], (j < rows)[:, None] & (i < rows)[None, :]
        here = base + i.to(tl.int64)[:, None] * x_n + own_j[None, :]
        there = base + j.to(tl.int64)[:, None] * x_n + own_i[None, :]
        above = tl.load(here, mask=mask, other=0.0).to(tl.float32)
        below = tl.load(there, mask=mirrored, other=0.0).to(tl.float32)
        total = rounded(above + tl.trans(below), x, CLAMPED)
        tl.debug_barrier()  # all is read before anything is written
        tl.store(here, total, mask=mask)
        tl.store(there, tl.trans(total), mask=mirrored)


@kernel("rest", direct=True)
def gather_columns(
    x, x_g: tl.int64, x_n: tl.int64, others, rest, rest_g: tl.int64, rest_n: tl.int64, rows, columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_COLUMNS` of the other columns, of `BLOCK_ROWS` rows."""
    group = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = tl.load(others + column, mask=column < columns, other=0)
    row = row.to(tl.int64)[:, None]
    found = tl.load(x + group * x_g + row * x_n + at[None, :], mask=mask, other=0.0)
    tl.store(rest + group * rest_g + row * rest_n + column[None, :], found, mask=mask)

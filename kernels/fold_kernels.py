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

from .triton_launch import kernel, tl
from .vector_kernels import in_rows, rounded


@kernel("x", direct=True)
def add_transposed(
    x, x_g: tl.int64, x_n: tl.int64, row_of, columns,
    CLAMPED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: what is between two runs of `BLOCK_COLUMNS` columns, both ways. `row_of` has the row of each column.

    All columns of a run are read and written, also those that are no rows, and to which nothing is added: memory is
    accessed in whole sectors. No other program touches these places. With itself, a run has one such place, which is
    written twice with the same numbers.
    """
    first, second = tl.program_id(0), tl.program_id(1)
    if first <= second:
        x += tl.program_id(2).to(tl.int64) * x_g
        columns = columns // ALIGN * ALIGN  # as it is; the compiler sees the factor
        i = first * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        j = second * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        row_i, row_j = tl.load(row_of + i, mask=i < columns, other=-1), tl.load(row_of + j, mask=j < columns, other=-1)
        mask = (row_i >= 0)[:, None] & (j < columns)[None, :]
        mirrored = (row_j >= 0)[:, None] & (i < columns)[None, :]
        here = in_rows(x, row_i[:, None] * x_n, j, ALIGN)
        there = in_rows(x, row_j[:, None] * x_n, i, ALIGN)
        above = tl.load(here, mask=mask, other=0.0).to(tl.float32)
        below = tl.load(there, mask=mirrored, other=0.0).to(tl.float32)
        total, of_mirror = above + tl.trans(below), below + tl.trans(above)
        tl.debug_barrier()  # all is read before anything is written
        tl.store(here, rounded(total, x, CLAMPED), mask=mask)
        tl.store(there, rounded(of_mirror, x, CLAMPED), mask=mirrored)


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

# mypy: disallow-untyped-defs=False
"""The Triton kernels over embeddings and their gradients: norms, the Jacobian of the normalisation, sums, scaling.

Each reads and writes its rows once, as far as they fit into registers, with 16 bytes a lane where `ALIGN` allows. A
program owns some rows, so there are no atomics and equal inputs give equal bits.
"""

from __future__ import annotations

from .rows_torch import LEAST_COSINE, NORM_FLOOR
from .triton_launch import constant, jit, kernel, tl

SMALLEST_NORM = constant(NORM_FLOOR)
LARGEST_INVERSE = constant(1 / NORM_FLOOR)
LEAST = constant(LEAST_COSINE)
LARGEST_HALF = constant(65504.0)


@jit
def in_rows(base, line, column, ALIGN: tl.constexpr):
    """Addresses in rows that begin at multiples of `ALIGN` numbers: as many are accessed at once."""
    row_bytes: tl.constexpr = ALIGN * base.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(base + (line + column[None, :]), [row_bytes, row_bytes])


@jit
def rounded(values, out, CLAMPED: tl.constexpr):
    """In the element type of `out`, and `CLAMPED` to the range of float16; NaN stays NaN."""
    if CLAMPED:
        values = tl.clamp(values, -LARGEST_HALF, LARGEST_HALF, propagate_nan=tl.PropagateNan.ALL)
    return values.to(out.dtype.element_ty)


@jit
def load_rows(base, line, column, stride_d, mask, DENSE: tl.constexpr, ALIGN: tl.constexpr):
    """Some rows in float32. The numbers of `DENSE` rows lie together."""
    if DENSE:
        x = tl.load(in_rows(base, line, column, ALIGN), mask=mask, other=0.0)
    else:
        x = tl.load(base + line + column[None, :] * stride_d, mask=mask, other=0.0)
    return x.to(tl.float32)


@kernel("out", "of_rows", "anchors", direct=True)
def inverse_norms(
    embeddings, stride_g: tl.int64, stride_n: tl.int64, stride_d: tl.int64, duals, duals_g: tl.int64,
    duals_n: tl.int64, row_of, out, of_rows, rows_g: tl.int64, anchors, anchors_g: tl.int64, anchors_n: tl.int64,
    tokens, width,
    DENSE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_ROWS` tokens of one layer. `duals` is None where they are the embeddings.

    Tokens that are rows, by `row_of`, also write to `of_rows` and copy their numbers to `anchors`; these may be None.
    """
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    line = group * stride_g + row.to(tl.int64)[:, None] * stride_n
    if row_of is not None:
        at = tl.load(row_of + row, mask=row < tokens, other=-1)
    width = width // ALIGN * ALIGN  # as it is; the compiler sees the factor
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    of_duals, of_both = total, total
    for start in range(0, width, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        mask = (row < tokens)[:, None] & (column < width)[None, :]
        e = load_rows(embeddings, line, column, stride_d, mask, DENSE, ALIGN)
        total += tl.sum(e * e, 1)
        if anchors is not None:
            to = in_rows(anchors, group * anchors_g + at[:, None] * anchors_n, column, ALIGN)
            tl.store(to, e.to(anchors.dtype.element_ty), mask=mask & (at >= 0)[:, None])
        if duals is not None:
            d_line = group * duals_g + row.to(tl.int64)[:, None] * duals_n
            d = load_rows(duals, d_line, column, 1, mask, True, ALIGN)
            of_duals += tl.sum(d * d, 1)
            of_both += tl.sum(e * d, 1)
    if duals is not None:
        least = LEAST * tl.sqrt_rn(total) * tl.sqrt_rn(of_duals)
        norm = tl.sqrt_rn(tl.maximum(of_both, least, propagate_nan=tl.PropagateNan.ALL))
        inverse = tl.where(least == 0.0, SMALLEST_NORM, tl.div_rn(1.0, tl.where(least == 0.0, 1.0, norm)))
    else:
        norm = tl.sqrt_rn(total)
        inverse = tl.where(norm > SMALLEST_NORM, tl.div_rn(1.0, tl.maximum(norm, SMALLEST_NORM)), LARGEST_INVERSE)
        inverse = tl.where(norm != norm, norm, inverse)  # NaN stays NaN
    tl.store(out + group * tokens + row, inverse, mask=row < tokens)
    if row_of is not None:
        tl.store(of_rows + group * rows_g + at, inverse, mask=at >= 0)


@kernel("out", direct=True)
def project_gradient(
    gradient, gradient_g: tl.int64, gradient_n: tl.int64, embeddings, stride_g: tl.int64, stride_n: tl.int64,
    stride_d: tl.int64, inverse_norm, inverse_g: tl.int64, factor, added, added_g: tl.int64, added_n: tl.int64,
    of_token, first_row, place, duals, duals_g: tl.int64, duals_n: tl.int64,
    out, out_g: tl.int64, out_n: tl.int64, tokens, width,
    OF_UNIT: tl.constexpr, CLAMPED: tl.constexpr, DENSE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_ROWS` tokens of one layer. `WHOLE` rows stay in registers; others are read a second time.

    `factor` is None where it is 1; `added` and `of_token` are None where nothing is added. `place` has the token of
    each row of `gradient`; None: they are the same. `duals` is None where they are the embeddings.
    """
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < tokens
    token = row.to(tl.int64)
    if place is not None:
        token = tl.load(place + row, mask=row_mask, other=0)
    inverse = tl.load(inverse_norm + group * inverse_g + token, mask=row_mask, other=0.0)
    by = 1.0
    if factor is not None:
        by = tl.load(factor + group)
    at = row.to(tl.int64)
    if of_token is not None:
        at = tl.load(of_token + row, mask=row_mask, other=-1) - first_row
    has_row, added_line = (at >= 0)[:, None], group * added_g + at[:, None] * added_n
    row, token = row.to(tl.int64)[:, None], token[:, None]
    u_line, e_line, out_line = (
        group * gradient_g + row * gradient_n, group * stride_g + token * stride_n, group * out_g + token * out_n
    )  # fmt: skip
    width = width // ALIGN * ALIGN  # as it is; the compiler sees the factor
    radial = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, BLOCK_COLUMNS if WHOLE else width, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        mask = row_mask[:, None] & (column < width)[None, :]
        u = load_sum(gradient, u_line, added, added_line, has_row, by, column, mask, ALIGN)
        unit = load_rows(embeddings, e_line, column, stride_d, mask, DENSE, ALIGN) * inverse[:, None]
        dual = unit
        if duals is not None:
            d_line = group * duals_g + token * duals_n
            dual = load_rows(duals, d_line, column, 1, mask, True, ALIGN) * inverse[:, None]
        radial += tl.sum(dual * u, 1)
        if WHOLE:
            store_tangent(out, out_line, column, mask, u, unit, radial, inverse, OF_UNIT, CLAMPED, ALIGN)
    if not WHOLE:
        for start in range(0, width, BLOCK_COLUMNS):
            column = start + tl.arange(0, BLOCK_COLUMNS)
            mask = row_mask[:, None] & (column < width)[None, :]
            u = load_sum(gradient, u_line, added, added_line, has_row, by, column, mask, ALIGN)
            unit = load_rows(embeddings, e_line, column, stride_d, mask, DENSE, ALIGN) * inverse[:, None]
            store_tangent(out, out_line, column, mask, u, unit, radial, inverse, OF_UNIT, CLAMPED, ALIGN)


@jit
def load_sum(gradient, line, added, added_line, has_row, by, column, mask, ALIGN: tl.constexpr):
    """`by (gradient + added)`, for some rows."""
    u = load_rows(gradient, line, column, 1, mask, True, ALIGN)
    if added is not None:
        u += load_rows(added, added_line, column, 1, mask & has_row, True, ALIGN)
    return u * by


@jit
def store_tangent(
    out, line, column, mask, u, unit, radial, inverse,
    OF_UNIT: tl.constexpr, CLAMPED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    radial = tl.where(inverse >= LARGEST_INVERSE, 0.0, radial)
    tangent = u - radial[:, None] * unit
    if OF_UNIT:
        tangent *= inverse[:, None]
    tl.store(in_rows(out, line, column, ALIGN), rounded(tangent, out, CLAMPED), mask=mask)


@kernel("out", direct=True)
def gather_rows(
    source, stride_g: tl.int64, stride_n: tl.int64, index, out, out_g: tl.int64, out_n: tl.int64, count, width,
    ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_COLUMNS` numbers of `BLOCK_ROWS` rows."""
    group = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at = tl.load(index + row, mask=row < count, other=0)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < count)[:, None] & (column < width // ALIGN * ALIGN)[None, :]
    found = tl.load(in_rows(source, group * stride_g + at[:, None] * stride_n, column, ALIGN), mask=mask, other=0.0)
    to = in_rows(out, group * out_g + row.to(tl.int64)[:, None] * out_n, column, ALIGN)
    tl.store(to, found.to(out.dtype.element_ty), mask=mask)


@kernel("out", direct=True)
def add_rows(
    rows, rows_g: tl.int64, rows_n: tl.int64, columns, out, out_g: tl.int64, out_n: tl.int64, count, width,
    ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_COLUMNS` numbers of `BLOCK_ROWS` rows."""
    group = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    to = tl.load(columns + row, mask=row < count, other=0)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < count)[:, None] & (column < width // ALIGN * ALIGN)[None, :]
    added = load_rows(rows, group * rows_g + row.to(tl.int64)[:, None] * rows_n, column, 1, mask, True, ALIGN)
    at = in_rows(out, group * out_g + to[:, None] * out_n, column, ALIGN)
    tl.store(at, tl.load(at, mask=mask, other=0.0) + added, mask=mask)


@kernel("values", direct=True)
def scale(
    values, factor, factor_g: tl.int64, count: tl.int64,
    ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_COLUMNS` numbers of one layer."""
    group = tl.program_id(1).to(tl.int64)
    by = tl.load(factor + group * factor_g)
    if by != 1.0:
        column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        mask = (column < count // ALIGN * ALIGN)[None, :]
        at = in_rows(values, group * count, column, ALIGN)
        tl.store(at, (tl.load(at, mask=mask, other=0.0).to(tl.float32) * by).to(values.dtype.element_ty), mask=mask)


@kernel("out", direct=True)
def place_rows(
    rows, rows_n: tl.int64, factor, index, out, out_n: tl.int64, count, width,
    ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_COLUMNS` numbers of `BLOCK_ROWS` rows, times `factor`, into the rows `index` of `out`."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    to = tl.load(index + row, mask=row < count, other=0)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < count)[:, None] & (column < width // ALIGN * ALIGN)[None, :]
    x = load_rows(rows, row.to(tl.int64)[:, None] * rows_n, column, 1, mask, True, ALIGN) * tl.load(factor)
    tl.store(in_rows(out, to[:, None] * out_n, column, ALIGN), x.to(out.dtype.element_ty), mask=mask)

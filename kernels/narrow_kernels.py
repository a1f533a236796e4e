# mypy: disallow-untyped-defs=False
"""The Triton kernels of `narrow_triton`: similarities are computed on chip and never stored.

Each kernel holds one tile of embeddings and streams the others past it, as flash attention does: a tile of dot
products is computed on the tensor cores and used in registers. What is computed from it:

    statistics       rows x one frame          lse, lse of the known, expected values, arg-max      one product
    row_gradient     rows x their sequence     dA_i = sum_k X_ik e_k, accumulated on chip           two products
    token_gradient   tokens x their rows       dE_k = sum_i X_ik e_i, accumulated on chip           two products

with `X = dL/dx` as `rows_torch` defines it, except for the part of the matches: each match subtracts its weight at its
target, which is called its pull. Pulls are sparse, so `finish` adds them. For each token it sums the gradient as a row,
the gradient as a column and the pulls, projects, and writes. Each number has one writer and each sum one order: no
atomics, equal bits for equal inputs. Row blocks stay within a sequence and token blocks within a frame; two small
tables, made on the host from the index, list where they begin and end.

Exponentials are powers of two, `exp(s - lse) = 2^(x r_i r_k c - lse log2(e))` with `c = log2(e) / tau`: the change of
base is part of the row's scale, which is multiplied in anyway. Columns beyond a block's end are masked by a bias of
-inf, whose addition is fused with that multiplication and costs no instruction.

The tile of `X` enters the second product in the element type of the embeddings. Rounding errors are relative to each
number, so a scale factor changes no accuracy. But fp16 has little range: there `X` is computed for *normalised*
embeddings, rounded to fp16 as they are loaded (norms would not fit), and multiplied by a power of two that brings its
bound to 2^14. In the other types embeddings stay raw and norms are part of `X`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .rows_kernels import LARGEST_INVERSE, as_reference, log_sum_exp
from .triton_launch import constant, jit, kernel, tl

LOG2E = constant(1.4426950408889634)
LN2 = constant(0.6931471805599453)


class RowBlock(NamedTuple):
    """A line of the table of row blocks, int64 [blocks, 6]: some rows of one sequence, its frames and token blocks."""

    first_row: Any
    end_row: Any
    first_frame: Any  # of the sequence, in the batch
    frame_count: Any
    first_token_block: Any  # of the sequence
    end_token_block: Any


class TokenBlock(NamedTuple):
    """A line of the table of token blocks, int64 [blocks, 5]: tokens of one frame, and the rows of its sequence."""

    first_token: Any
    end_token: Any
    frame: Any  # within the sequence
    first_row: Any
    end_row: Any


@jit
def load_row_block(table, block):
    """One line of the table; the compiler drops the columns that a kernel does not use."""
    line = table + block * 6
    return RowBlock(
        tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3), tl.load(line + 4), tl.load(line + 5)
    )


@jit
def load_token_block(table, block):
    """One line of the table; the compiler drops the columns that a kernel does not use."""
    line = table + block * 5
    return TokenBlock(tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3), tl.load(line + 4))


@jit
def load_tile(
    embeddings, token, stride_n, stride_d, inverse, token_mask, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    NORMALISED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Embeddings of some tokens, [B, BLOCK_WIDTH]; zero outside the mask."""
    d = tl.arange(0, BLOCK_WIDTH)
    mask = token_mask[:, None]
    if WIDTH < BLOCK_WIDTH:
        mask = mask & (d < WIDTH)[None, :]
    line = embeddings + token[:, None] * stride_n + (d.to(tl.int64) * stride_d)[None, :]
    tile = tl.load(line, mask=mask, other=0.0)
    if UPCAST:  # NumPy, and so the interpreter, has no bfloat16
        tile = tile.to(tl.float32)
    if NORMALISED:
        tile = (tile.to(tl.float32) * inverse[:, None]).to(tile.dtype)
    return tile


@jit
def own_offset(own, start, BLOCK: tl.constexpr):
    """Position of a token in the block that begins at `start`, or -1."""
    offset = own - start
    return tl.where((offset >= 0) & (offset < BLOCK), offset, -1).to(tl.int32)


@kernel("lse", "known_lse", "expected", "best", "peak")
def statistics(
    embeddings, stride_g, stride_n, stride_d, inverse_norm, tokens, temperature, row_token,
    values, values_n, known, row_blocks, frame_offsets, run_start,
    lse, known_lse, expected, best, peak, rows, frames,
    EXCLUDE_OWN: tl.constexpr, VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, NORMALISED: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: a block of rows against one frame of their sequence, by the online softmax of `rows_kernels`.

    With `run_start`, a block of rows skips the frames in which it has no match.
    """
    group = tl.program_id(1).to(tl.int64)
    frame = tl.program_id(0) % frames
    block = load_row_block(row_blocks, (tl.program_id(0) // frames).to(tl.int64))
    row = block.first_row + tl.arange(0, BLOCK_ROWS)
    row_mask = row < block.end_row
    in_batch = frame_offsets + block.first_frame + frame
    exists = frame < block.frame_count
    begin = tl.load(in_batch, mask=exists, other=0)
    end = tl.load(in_batch + 1, mask=exists, other=0)
    if run_start is not None:
        run = run_start + row * frames + frame
        matched = tl.load(run + 1, mask=row_mask, other=0) > tl.load(run, mask=row_mask, other=0)
        end = tl.where(tl.max(matched.to(tl.int32), 0) > 0, end, begin)

    embeddings += group * stride_g
    inverse_norm += group * tokens
    own = tl.load(row_token + row, mask=row_mask, other=-1)
    inverse = tl.load(inverse_norm + own, mask=row_mask, other=0.0)
    a = load_tile(embeddings, own, stride_n, stride_d, inverse, row_mask, WIDTH, BLOCK_WIDTH, NORMALISED, UPCAST)
    scale = LOG2E / tl.load(temperature) * (1.0 if NORMALISED else inverse)  # [BLOCK_ROWS]
    scale = tl.broadcast_to(scale, [BLOCK_ROWS])
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    known_maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    known_total = tl.zeros([BLOCK_ROWS], tl.float32)
    slot = tl.arange(0, PADDED_VALUES)
    weighted = tl.zeros([BLOCK_ROWS, PADDED_VALUES], tl.float32)
    best_offset = tl.full([BLOCK_ROWS], -1, tl.int32)  # in the frame
    offset = tl.arange(0, BLOCK_COLUMNS)
    for start in range(0, (end - begin).to(tl.int32), BLOCK_COLUMNS):
        token = begin + start + offset
        token_mask = token < end
        norm = tl.load(inverse_norm + token, mask=token_mask, other=0.0)
        e = load_tile(embeddings, token, stride_n, stride_d, norm, token_mask, WIDTH, BLOCK_WIDTH, NORMALISED, UPCAST)
        x = tl.dot(a, tl.trans(e), input_precision=PRECISION)
        bias = tl.where(token_mask, 0.0, float("-inf"))
        factor = 1.0 if NORMALISED else norm[None, :]
        s = x * scale[:, None] * factor + bias[None, :]
        if EXCLUDE_OWN:
            s = tl.where(offset[None, :] == own_offset(own, begin + start, BLOCK_COLUMNS)[:, None], float("-inf"), s)
        block_maximum = tl.max(s, 1)
        block_best = tl.min(tl.where(s == block_maximum[:, None], offset[None, :], BLOCK_COLUMNS), 1)
        best_offset = tl.where(block_maximum > maximum, start + block_best, best_offset)
        maximum, total, _, _ = softmax_step_base2(s, block_maximum, maximum, total)
        if VALUES > 0:
            is_known = tl.load(known + token, mask=token_mask, other=0) != 0
            known_s = s + tl.where(is_known, 0.0, float("-inf"))[None, :]
            known_maximum, known_total, weight, shrink = softmax_step_base2(
                known_s, tl.max(known_s, 1), known_maximum, known_total
            )
            weighted *= shrink[:, None]
            for v in tl.static_range(VALUES):
                value = tl.load(values + token * values_n + v, mask=token_mask & is_known, other=0.0)
                part = tl.sum(weight * value[None, :], 1)
                weighted += tl.where(slot[None, :] == v, part[:, None], 0.0)

    cell = (group * rows + row) * frames + frame
    tl.store(lse + cell, log_sum_exp(maximum * LN2, total), mask=row_mask)
    tl.store(peak + cell, maximum * LN2, mask=row_mask)
    tl.store(best + cell, tl.where(best_offset < 0, -1, begin + best_offset), mask=row_mask)
    tl.store(known_lse + cell, log_sum_exp(known_maximum * LN2, known_total), mask=row_mask)
    if VALUES > 0:
        mean = weighted / tl.where(known_total == 0.0, 1.0, known_total)[:, None]
        mask = row_mask[:, None] & (slot < VALUES)[None, :]
        tl.store(expected + cell[:, None] * VALUES + slot[None, :], mean, mask=mask)


@jit
def softmax_step_base2(s, block_maximum, maximum, total):
    """`rows_kernels.softmax_step` in powers of two, for a block whose maximum was computed before."""
    new_maximum = tl.maximum(maximum, block_maximum)
    reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weight = tl.exp2(s - reference[:, None])
    shrink = tl.exp2(maximum - reference)
    return new_maximum, total * shrink + tl.sum(weight, 1), weight, shrink


@kernel("out")
def match_similarities(
    embeddings, stride_g, stride_n, stride_d, inverse_norm, tokens, temperature, row_token,
    row, target, out, matches,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: the scaled similarities of some matches, in float32."""
    group = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = position < matches
    embeddings += group * stride_g
    inverse_norm += group * tokens
    i = tl.load(row_token + tl.load(row + position, mask=mask, other=0), mask=mask, other=0)
    k = tl.load(target + position, mask=mask, other=0)
    x = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        d = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        width_mask = mask[:, None] & (d < WIDTH)[None, :]
        e_i = tl.load(embeddings + i[:, None] * stride_n + d[None, :] * stride_d, mask=width_mask, other=0.0)
        e_k = tl.load(embeddings + k[:, None] * stride_n + d[None, :] * stride_d, mask=width_mask, other=0.0)
        x += tl.sum(e_i.to(tl.float32) * e_k.to(tl.float32), 1)
    norms = tl.load(inverse_norm + i, mask=mask, other=0.0) * tl.load(inverse_norm + k, mask=mask, other=0.0)
    tl.store(out + group * matches + position, x * norms / tl.load(temperature), mask=mask)


@jit
def row_statistics(
    cell, row_mask, lse, known_lse, expected, upstream_lse, upstream_expected, boost, VALUES: tl.constexpr
):
    """What the gradient of some rows in one frame depends on: `a`, `sum_v b_v E_v`, and both references."""
    reference = as_reference(tl.load(lse + cell, mask=row_mask, other=float("-inf"))) * LOG2E
    known_reference = as_reference(tl.load(known_lse + cell, mask=row_mask, other=float("-inf"))) * LOG2E
    a = tl.load(upstream_lse + cell, mask=row_mask, other=0.0) * boost
    center = tl.zeros_like(a)
    for v in tl.static_range(VALUES):
        b = tl.load(upstream_expected + cell * VALUES + v, mask=row_mask, other=0.0) * boost
        center += b * tl.load(expected + cell * VALUES + v, mask=row_mask, other=0.0)
    return a, center, reference, known_reference


@kernel("out")
def row_gradient(
    embeddings, stride_g, stride_n, stride_d, inverse_norm, tokens, temperature, row_token,
    values, values_n, known, row_blocks, token_blocks,
    lse, known_lse, expected, upstream_lse, upstream_expected, boost, out, rows, frames,
    EXCLUDE_OWN: tl.constexpr, VALUES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    NORMALISED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of a block of rows, from all tokens of their sequence."""
    group = tl.program_id(1).to(tl.int64)
    block = load_row_block(row_blocks, tl.program_id(0).to(tl.int64))
    row = block.first_row + tl.arange(0, BLOCK_ROWS)
    row_mask = row < block.end_row
    block_count = (block.end_token_block - block.first_token_block).to(tl.int32)
    embeddings += group * stride_g
    inverse_norm += group * tokens
    row_cell = (group * rows + row) * frames
    boost_factor = tl.load(boost + group)
    tau = tl.load(temperature)
    own = tl.load(row_token + row, mask=row_mask, other=-1)
    inverse = tl.load(inverse_norm + own, mask=row_mask, other=0.0)
    a = load_tile(embeddings, own, stride_n, stride_d, inverse, row_mask, WIDTH, BLOCK_WIDTH, NORMALISED, UPCAST)
    scale = tl.broadcast_to(LOG2E / tau * (1.0 if NORMALISED else inverse), [BLOCK_ROWS])
    offset = tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for nth in range(block_count):
        streamed = load_token_block(token_blocks, block.first_token_block + nth)
        start = streamed.first_token
        token = start + offset
        token_mask = token < streamed.end_token
        cell = row_cell + streamed.frame
        norm = tl.load(inverse_norm + token, mask=token_mask, other=0.0)
        e = load_tile(embeddings, token, stride_n, stride_d, norm, token_mask, WIDTH, BLOCK_WIDTH, NORMALISED, UPCAST)
        x = tl.dot(a, tl.trans(e), input_precision=PRECISION)
        factor = 1.0 if NORMALISED else norm[None, :]
        s = x * scale[:, None] * factor + tl.where(token_mask, 0.0, float("-inf"))[None, :]
        if EXCLUDE_OWN:
            s = tl.where(offset[None, :] == own_offset(own, start, BLOCK_COLUMNS)[:, None], float("-inf"), s)
        weight, center, reference, known_reference = row_statistics(
            cell, row_mask, lse, known_lse, expected, upstream_lse, upstream_expected, boost_factor, VALUES
        )
        gradient = weight[:, None] * tl.exp2(s - reference[:, None])
        if VALUES > 0:
            is_known = tl.load(known + token, mask=token_mask, other=0) != 0
            value_pull = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32) - center[:, None]  # sum_v b_v (v_k - E_v)
            for v in tl.static_range(VALUES):
                b = tl.load(upstream_expected + cell * VALUES + v, mask=row_mask, other=0.0) * boost_factor
                value = tl.load(values + token * values_n + v, mask=token_mask & is_known, other=0.0)
                value_pull += b[:, None] * value[None, :]
            bias = tl.where(is_known, 0.0, float("-inf"))
            gradient += value_pull * tl.exp2(s - known_reference[:, None] + bias[None, :])
        total = tl.dot((gradient * factor).to(e.dtype), e, total, input_precision=PRECISION)

    total *= (inverse / (tau * boost_factor))[:, None]
    d = tl.arange(0, BLOCK_WIDTH)
    line = out + (group * rows + row)[:, None] * WIDTH + d[None, :]
    tl.store(line, total, mask=row_mask[:, None] & (d < WIDTH)[None, :])


@kernel("out")
def token_gradient(
    embeddings, stride_g, stride_n, stride_d, inverse_norm, tokens, temperature, row_token,
    values, values_n, known, token_blocks,
    lse, known_lse, expected, upstream_lse, upstream_expected, boost, out, out_g, out_n, out_d, rows, frames,
    EXCLUDE_OWN: tl.constexpr, VALUES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    NORMALISED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of a block of tokens of one frame, from all rows of their sequence.

    Here the tile of tokens is held and rows are streamed, so dot products are transposed: [tokens, rows].
    """
    group = tl.program_id(1).to(tl.int64)
    block = load_token_block(token_blocks, tl.program_id(0).to(tl.int64))
    token = block.first_token + tl.arange(0, BLOCK_COLUMNS)
    token_mask = token < block.end_token
    embeddings += group * stride_g
    inverse_norm += group * tokens
    boost_factor = tl.load(boost + group)
    tau = tl.load(temperature)
    norm = tl.load(inverse_norm + token, mask=token_mask, other=0.0)
    e = load_tile(embeddings, token, stride_n, stride_d, norm, token_mask, WIDTH, BLOCK_WIDTH, NORMALISED, UPCAST)
    scale = tl.broadcast_to(LOG2E / tau * (1.0 if NORMALISED else norm), [BLOCK_COLUMNS])
    offset = tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros([BLOCK_COLUMNS, BLOCK_WIDTH], tl.float32)
    for start in range(0, (block.end_row - block.first_row).to(tl.int32), BLOCK_ROWS):
        row = block.first_row + start + tl.arange(0, BLOCK_ROWS)
        row_mask = row < block.end_row
        own = tl.load(row_token + row, mask=row_mask, other=-1)
        inverse = tl.load(inverse_norm + own, mask=row_mask, other=0.0)
        a = load_tile(embeddings, own, stride_n, stride_d, inverse, row_mask, WIDTH, BLOCK_WIDTH, NORMALISED, UPCAST)
        x = tl.dot(e, tl.trans(a), input_precision=PRECISION)
        s = x * scale[:, None]
        factor = tl.broadcast_to(boost_factor, [BLOCK_ROWS])
        if not NORMALISED:
            s *= inverse[None, :]
            factor *= inverse  # `r_i` is a factor of every number in column i of the tile
        if EXCLUDE_OWN:
            own_row = own_offset(own, block.first_token, BLOCK_COLUMNS)
            s = tl.where(offset[:, None] == own_row[None, :], float("-inf"), s)
        cell = (group * rows + row) * frames + block.frame
        weight, center, reference, known_reference = row_statistics(
            cell, row_mask, lse, known_lse, expected, upstream_lse, upstream_expected, factor, VALUES
        )
        gradient = weight[None, :] * tl.exp2(s - reference[None, :])
        if VALUES > 0:
            is_known = tl.load(known + token, mask=token_mask, other=0) != 0
            value_pull = tl.zeros([BLOCK_COLUMNS, BLOCK_ROWS], tl.float32) - center[None, :]  # sum_v b_v (v_k - E_v)
            for v in tl.static_range(VALUES):
                b = tl.load(upstream_expected + cell * VALUES + v, mask=row_mask, other=0.0) * factor
                value = tl.load(values + token * values_n + v, mask=token_mask & is_known, other=0.0)
                value_pull += value[:, None] * b[None, :]
            bias = tl.where(is_known, 0.0, float("-inf"))
            gradient += value_pull * tl.exp2(s - known_reference[None, :] + bias[:, None])
        total = tl.dot(gradient.to(a.dtype), a, total, input_precision=PRECISION)

    total *= (norm / (tau * boost_factor))[:, None]
    d = tl.arange(0, BLOCK_WIDTH).to(tl.int64)
    line = out + group * out_g + token[:, None] * out_n + d[None, :] * out_d
    tl.store(line, total, mask=token_mask[:, None] & (d < WIDTH)[None, :])


@kernel("radial", "out")
def finish(
    embeddings, stride_g, stride_n, stride_d, inverse_norm, tokens, temperature, row_token,
    row_of_token, row_part, token_part, token_part_g, token_part_n, token_part_d,
    run_start, target, target_start, by_target, row_of_match, order, corr_weight, corr_weight_g, corr_weight_m,
    radial, out, out_g, out_n, out_d, rows, frames, limit,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: a few tokens. Adds their gradients as row and as column and the pulls of their matches; projects.

    Also writes `e_i . dA_i` of each row to `radial`, from which the temperature's gradient is summed. `out` is None
    where only that is needed. The arguments from `run_start` to `corr_weight_m` are None where there are no matches.
    """
    group = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token_mask = token < tokens
    embeddings += group * stride_g
    inverse_norm += group * tokens
    if run_start is not None:
        corr_weight += group * corr_weight_g
    d = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    mask = token_mask[:, None] & (d < WIDTH)[None, :]
    line = embeddings + token[:, None] * stride_n + d[None, :] * stride_d
    e = tl.load(line, mask=mask, other=0.0).to(tl.float32)
    norm = tl.load(inverse_norm + token, mask=token_mask, other=0.0)
    scale = norm / tl.load(temperature)
    row = tl.load(row_of_token + token, mask=token_mask, other=-1)
    is_row = row >= 0
    line = row_part + (group * rows + row)[:, None] * WIDTH + d[None, :]
    u = tl.load(line, mask=mask & is_row[:, None], other=0.0)
    if run_start is not None:  # the targets of this row
        first = tl.load(run_start + row * frames, mask=is_row, other=0)
        last = tl.load(run_start + (row + 1) * frames, mask=is_row, other=0)
        for k in range(tl.max((last - first).to(tl.int32), 0)):
            in_run = first + k < last
            partner = tl.load(target + first + k, mask=in_run, other=0)
            match = tl.load(order + first + k, mask=in_run, other=0)
            weight = scale * tl.load(corr_weight + match * corr_weight_m, mask=in_run, other=0.0)
            u -= pull(embeddings, stride_n, stride_d, inverse_norm, partner, weight, in_run, d, mask)
    tl.store(radial + group * rows + row, tl.sum(u * e, 1), mask=is_row)
    if out is not None:
        line = token_part + group * token_part_g + token[:, None] * token_part_n + d[None, :] * token_part_d
        u += tl.load(line, mask=mask, other=0.0)
        if run_start is not None:  # the rows that have this token as a target
            first = tl.load(target_start + token, mask=token_mask, other=0)
            last = tl.load(target_start + token + 1, mask=token_mask, other=0)
            for k in range(tl.max((last - first).to(tl.int32), 0)):
                in_run = first + k < last
                position = tl.load(by_target + first + k, mask=in_run, other=0)
                partner = tl.load(row_of_match + position, mask=in_run, other=0)
                partner = tl.load(row_token + partner, mask=in_run, other=0)
                match = tl.load(order + position, mask=in_run, other=0)
                weight = scale * tl.load(corr_weight + match * corr_weight_m, mask=in_run, other=0.0)
                u -= pull(embeddings, stride_n, stride_d, inverse_norm, partner, weight, in_run, d, mask)
        unit = e * norm[:, None]
        radial = tl.where(norm >= LARGEST_INVERSE, 0.0, tl.sum(unit * u, 1))
        u -= radial[:, None] * unit
        u = tl.clamp(u, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        line = out + group * out_g + token[:, None] * out_n + d[None, :] * out_d
        tl.store(line, u.to(out.dtype.element_ty), mask=mask)


@jit
def pull(embeddings, stride_n, stride_d, inverse_norm, partner, weight, pull_mask, d, mask):
    """For each token of the block, `weight e_hat` of one partner token."""
    weight *= tl.load(inverse_norm + partner, mask=pull_mask, other=0.0)
    line = embeddings + partner[:, None] * stride_n + d[None, :] * stride_d
    return weight[:, None] * tl.load(line, mask=mask & pull_mask[:, None], other=0.0).to(tl.float32)

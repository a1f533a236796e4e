# mypy: disallow-untyped-defs=False
"""The Triton kernels of `rows_triton` that turn statistics into loss terms and gradients.

The text of `rows_kernels` explains the two ways to take exponentials, and why results have equal bits.

`exp(s - lse)` keeps all digits of `lse`: it is `2^(y - h) 2^-r`, where `h` is the integer nearest to `lse log2(e)` and
`r` the rest. The second factor is computed once for each row.
"""

from __future__ import annotations

from .rows_kernels import (
    LARGEST_BOUND,
    LN2,
    LOG2E,
    exponent,
    frame_columns,
    in_frame,
    log_add,
    log_of,
    online_step,
    run_of,
    share,
)
from .triton_launch import constant, jit, kernel, tl
from .vector_kernels import rounded

LOG2E_REST = constant(1.4426950408889634 - 1.44269502162933349609375)  # what the float32 `LOG2E` lacks


@jit
def split(lse):
    """`lse` in units of log 2, as an integer and the rest: no digit is lost. An empty sum gives (inf, 0)."""
    empty = lse == float("-inf")
    lse = tl.where(empty, 0.0, lse)
    whole = tl.floor(lse * LOG2E + 0.5)
    rest = tl.fma(lse, LOG2E, -whole) + lse * LOG2E_REST
    return tl.where(empty, float("inf"), whole), rest


@kernel(
    "corr_term", "depth_term", "best_term", "confidence_term", "pull", "upstream_lse", "upstream_expected", direct=True
)
def loss_terms(
    lse, negative_lse, expected, best, peak, run_start, longest, order, depth, has_depth,
    positive, positive_g: tl.int64,
    corr_weight, corr_weight_g: tl.int64, corr_weight_m: tl.int64,
    depth_weight, depth_weight_g: tl.int64, depth_weight_m: tl.int64,
    corr_term, depth_term, best_term, confidence_term, term_g: tl.int64,
    pull, pull_g: tl.int64, upstream_lse, upstream_expected, rows, frames, eps,
    VALUES: tl.constexpr, SEQUENCE_NEGATIVES: tl.constexpr, IGNORED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_ROWS` rows, `BLOCK_COLUMNS` frames at a time. Each lane visits the matches of its frame.

    The weights, `pull` and the upstream gradients are None where only the terms are needed.
    """
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < rows
    row = row.to(tl.int64)
    cell_of_row = (group * rows + row)[:, None] * frames
    positive += group * positive_g

    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    if SEQUENCE_NEGATIVES:
        for start in range(0, frames, BLOCK_COLUMNS):
            frame = start + tl.arange(0, BLOCK_COLUMNS)
            mask = row_mask[:, None] & (frame < frames)[None, :]
            y = tl.load(negative_lse + cell_of_row + frame[None, :], mask=mask, other=float("-inf")) * LOG2E
            maximum, total, _, _ = online_step(y, maximum, total)
    sequence_lse = log_of(total, maximum)[:, None]

    row_weight = tl.zeros([BLOCK_ROWS], tl.float32)  # sum of the corr weights of the row's matches
    for start in range(0, frames, BLOCK_COLUMNS):
        frame = (start + tl.arange(0, BLOCK_COLUMNS))[None, :]
        mask = row_mask[:, None] & (frame < frames)
        cell = cell_of_row + frame
        first = tl.load(run_start + row[:, None] * longest + frame, mask=mask, other=0)
        count = (tl.load(run_start + row[:, None] * longest + frame + 1, mask=mask, other=0) - first).to(tl.int32)
        some = count > 0
        negatives = sequence_lse
        if not SEQUENCE_NEGATIVES:
            negatives = tl.load(negative_lse + cell, mask=some, other=0.0)
        frame_lse = tl.load(lse + cell, mask=some, other=0.0)
        confidence = tl.exp(tl.load(peak + cell, mask=some, other=0.0) - frame_lse)
        frame_best = tl.load(best + cell, mask=some, other=0)
        if VALUES > 0:
            frame_depth = tl.load(expected + cell * VALUES, mask=some, other=0.0)
        frame_weight = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        depth_slopes = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for k in range(tl.max(tl.max(count, 1), 0)):
            here = k < count
            at = first + k
            match = tl.load(order + at, mask=here, other=0)
            s = tl.load(positive + at, mask=here, other=0.0)
            normaliser = negatives
            if IGNORED:
                normaliser = log_add(negatives, s)
            out = group * term_g + match
            tl.store(corr_term + out, normaliser - s, mask=here)
            tl.store(best_term + out, frame_best, mask=here)
            tl.store(confidence_term + out, confidence, mask=here)
            error = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
            if VALUES > 0:
                has_term = here & (tl.load(has_depth + at, mask=here, other=0) != 0)
                difference = tl.load(depth + at, mask=has_term, other=0.0) - frame_depth
                size = tl.where(has_term, difference + 2.0 * frame_depth + eps, 1.0)
                error = tl.where(has_term, tl.abs(difference) / size, 0.0)
            tl.store(depth_term + out, error, mask=here)
            if pull is not None:
                weight = tl.load(corr_weight + group * corr_weight_g + match * corr_weight_m, mask=here, other=0.0)
                if IGNORED:  # times the probability of the negatives
                    weight *= share(negatives, normaliser)
                tl.store(pull + group * pull_g + at, -weight, mask=here)
                frame_weight += weight
                if VALUES > 0:
                    sign = tl.where(difference > 0.0, 1.0, 0.0) - tl.where(difference < 0.0, 1.0, 0.0)
                    weight_at = depth_weight + group * depth_weight_g + match * depth_weight_m
                    depth_slopes -= tl.load(weight_at, mask=has_term, other=0.0) * (sign + error) / size
        if pull is not None:
            row_weight += tl.sum(frame_weight, 1)
            if not SEQUENCE_NEGATIVES:
                tl.store(upstream_lse + cell, frame_weight, mask=mask)
            for v in tl.static_range(VALUES):
                slopes = depth_slopes if v == 0 else tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
                tl.store(upstream_expected + cell * VALUES + v, slopes, mask=mask)
    if SEQUENCE_NEGATIVES and pull is not None:
        for start in range(0, frames, BLOCK_COLUMNS):
            frame = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
            mask = row_mask[:, None] & (frame < frames)
            frame_lse = tl.load(negative_lse + cell_of_row + frame, mask=mask, other=float("-inf"))
            of_frame = row_weight[:, None] * share(frame_lse, sequence_lse)
            tl.store(upstream_lse + cell_of_row + frame, of_frame, mask=mask)


@jit
def add_value_part(total, known, values, column, mask, b, center, others_b, factor, VALUES: tl.constexpr):
    """Adds `sum_v b_v (v_k - E_v)` at some columns, 0 where no value is known; `b` and `center` have the `factor`."""
    total -= center[:, None] * tl.load(known + column, mask=mask, other=0.0)
    for v in tl.static_range(VALUES):
        b_v = b if v == 0 else tl.load(others_b + v) * factor
        value = tl.load(values + column * VALUES + v, mask=mask, other=0.0)
        total += b_v[:, None] * value
    return total


@jit
def store_gradient(line, column, gradient, mask, CLAMPED: tl.constexpr):
    tl.store(line + column, rounded(gradient, line, CLAMPED), mask=mask)


@kernel("out", direct=True)
def similarity_gradient(
    similarity, pitch_g: tl.int64, pitch: tl.int64, row_scale, row_scale_g: tl.int64, token_scale,
    token_scale_g: tl.int64, temperature, row_token, first_token: tl.int64, frame_offsets, first_column: tl.int64,
    columns, values, known, lse, known_lse, expected, upstream_lse, upstream_expected,
    run_start, longest, target, positive, positive_g: tl.int64, pull, pull_g: tl.int64,
    out, out_g: tl.int64, out_pitch: tl.int64, rows, frames,
    VALUES: tl.constexpr, IGNORED: tl.constexpr, CLAMPED: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_ROWS` rows against one frame. The same program reads each similarity before it writes there,
    so `out` may be the memory of `similarity`.

    `lse` is that of the negatives. `row_token` and the arguments from `run_start` to `pull_g` may be None.
    """
    frame = tl.program_id(0)
    group = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < rows
    row = tl.minimum(row, rows - 1).to(tl.int64)
    begin, size = frame_columns(frame_offsets, frame, first_column, columns, ALIGN)
    first_token += begin
    cell = (group * rows + row) * frames + frame
    c = LOG2E / tl.load(temperature)
    scale = tl.load(row_scale + group * row_scale_g + row) * c
    frame_lse, frame_known = tl.load(lse + cell), tl.load(known_lse + cell)
    reference, rest = split(frame_lse)  # exp(s - lse) = 2^(y - reference) 2^-rest; 0 for an empty sum
    known_reference, known_rest = split(frame_known)
    known_rest = tl.exp2(-known_rest)
    a = tl.load(upstream_lse + cell) * LN2  # `scale` has the factor log2(e)
    row_a = a * tl.exp2(-rest)
    b = tl.zeros([BLOCK_ROWS], tl.float32)
    center = tl.zeros([BLOCK_ROWS], tl.float32)  # sum_v b_v E_v
    for v in tl.static_range(VALUES):
        b_v = tl.load(upstream_expected + cell * VALUES + v) * LN2
        center += b_v * tl.load(expected + cell * VALUES + v)
        if v == 0:
            b = b_v
    others_b = upstream_expected + cell * VALUES

    line = tl.multiple_of(similarity + group * pitch_g + begin + row[:, None] * pitch, [4 * ALIGN, 4 * ALIGN])
    out_bytes: tl.constexpr = ALIGN * out.dtype.element_ty.primitive_bitwidth // 8
    to = tl.multiple_of(out + group * out_g + begin + row[:, None] * out_pitch, [out_bytes, out_bytes])
    norms = tl.multiple_of(token_scale + group * token_scale_g + begin, 4 * ALIGN)
    if VALUES > 0:
        values = tl.multiple_of(values + begin * VALUES, 4 * ALIGN)
        known = tl.multiple_of(known + begin, 4 * ALIGN)
    offset = tl.arange(0, BLOCK_COLUMNS)
    if c <= LARGEST_BOUND:
        ratio = tl.where(frame_lse == float("-inf"), 0.0, tl.exp2(reference - known_reference) * known_rest)
        for start in range(0, size, BLOCK_COLUMNS):
            column = start + offset
            inside = column < size
            x = tl.load(line + column[None, :], mask=inside[None, :], other=0.0)
            factor = scale[:, None] * tl.load(norms + column, mask=inside, other=0.0)[None, :]
            e = tl.exp2(exponent(x, factor, reference[:, None]))
            weight = row_a[:, None]
            if VALUES > 0:
                at, mask = column[None, :], inside[None, :]
                b_here, center_here = b * ratio, center * ratio
                weight = add_value_part(
                    weight, known, values, at, mask, b_here, center_here, others_b, ratio * LN2, VALUES
                )
            store_gradient(to, column[None, :], e * weight * factor, row_mask[:, None] & inside[None, :], CLAMPED)
    else:
        for start in range(0, size, BLOCK_COLUMNS):
            column = start + offset
            inside = column < size
            x = tl.load(line + column[None, :], mask=inside[None, :], other=0.0)
            factor = scale[:, None] * tl.load(norms + column, mask=inside, other=0.0)[None, :]
            gradient = row_a[:, None] * tl.exp2(exponent(x, factor, reference[:, None]))
            if VALUES > 0:
                at, mask = column[None, :], inside[None, :]
                part = add_value_part(0.0, known, values, at, mask, b, center, others_b, LN2, VALUES)
                # Only a token of unknown value, whose part is 0, lies above the known ones: 0 times inf would be NaN.
                y = exponent(x, factor, known_reference[:, None])
                y = tl.minimum(y, 1.0, propagate_nan=tl.PropagateNan.ALL)
                gradient += part * tl.exp2(y) * known_rest[:, None]
            store_gradient(to, column[None, :], gradient * factor, row_mask[:, None] & inside[None, :], CLAMPED)

    tl.debug_barrier()
    if row_token is not None:
        own = tl.load(row_token + row) - first_token
        nothing = tl.zeros([BLOCK_ROWS, 1], tl.float32)
        store_gradient(to, own[:, None], nothing, in_frame(own, size, row_mask)[:, None], CLAMPED)
    if run_start is not None:
        first, count = run_of(run_start, row, longest, frame)
        before = tl.full([BLOCK_ROWS], -1, tl.int64)
        pulled = tl.zeros([BLOCK_ROWS], tl.float32)  # by the matches of one target, which lie together
        for k in range(tl.max(count, 0)):
            mine = row_mask & (k < count)
            token = tl.load(target + first + k, mask=mine, other=-1)
            if pull is not None:
                pulled = tl.where(token == before, pulled, 0.0)
                pulled += tl.load(pull + group * pull_g + first + k, mask=mine, other=0.0)
            before = token
            column = token - first_token
            here = in_frame(column, size, mine)
            s = tl.load(positive + group * positive_g + first + k, mask=here, other=0.0)
            gradient = pulled * LN2
            if not IGNORED:
                gradient += a * share(s, tl.where(frame_lse == float("-inf"), float("inf"), frame_lse))
            if VALUES > 0:
                at, mask = column[:, None], here[:, None]
                part = add_value_part(0.0, known, values, at, mask, b, center, others_b, LN2, VALUES)
                known_s = tl.where(frame_known == float("-inf"), float("inf"), frame_known)
                known_s = tl.minimum(s - known_s, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as above
                gradient += tl.sum(part, 1) * tl.exp(known_s)
            gradient *= scale * tl.load(norms + column, mask=here, other=0.0)
            store_gradient(to, column[:, None], gradient[:, None], here[:, None], CLAMPED)

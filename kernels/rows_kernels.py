# mypy: disallow-untyped-defs=False
"""The Triton kernels of `rows_triton`: one for each row operation of `rows_torch`.

Nothing is accumulated across programs: a program owns some rows of one frame of one layer (or some rows of a matrix),
loops over the columns from left to right, and writes results that no other program writes. So there are no atomics,
the order of every sum is fixed, and equal inputs give equal bits.

The softmax over the column blocks of a frame is the online one. With `m` the maximum so far and `z` the sum of
`exp(s - m)` so far, a block with maximum `m'` gives `M = max(m, m')`, `z <- z exp(m - M) + sum exp(s - M)`, `m <- M`;
every exponent is <= 0, hence nothing overflows, and the largest term is exactly 1, hence nothing is lost but terms
below 2^-24 of it. Tokens of known value have a second `m` and `z`: they may all lie far below the others, and then
their sum under the common maximum would vanish. A row without tokens keeps `m = -inf`, `z = 0`; where that is used as
a reference it is replaced by 0, because `exp(-inf - 0) = 0` while `-inf - -inf` would give NaN.

`best` moves only to a strictly larger maximum, and within a block it is the least index that reaches it: the first of
equals. All addresses are 64-bit. The temperature is read on the device, the host never waits for it.
"""

from __future__ import annotations

from .rows_torch import NORM_FLOOR
from .triton_launch import constant, jit, kernel, tl

SMALLEST_NORM = constant(NORM_FLOOR)
LARGEST_INVERSE = constant(1 / NORM_FLOOR)


@jit
def scaled_similarity(x, row_scale, token_scale, temperature):
    """`s` from raw dot products; dividing last, in the order of `rows_torch`."""
    return x * row_scale[:, None] * token_scale[None, :] / temperature


@jit
def softmax_step(s, maximum, total):
    """One block of the online softmax: the new maximum and sum, the block's weights, the factor of the old sums."""
    new_maximum = tl.maximum(maximum, tl.max(s, 1))
    reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weight = tl.exp(s - reference[:, None])
    shrink = tl.exp(maximum - reference)
    return new_maximum, total * shrink + tl.sum(weight, 1), weight, shrink


@jit
def log_sum_exp(maximum, total):
    """`maximum + log(total)`; -inf for an empty sum."""
    return tl.where(maximum == float("-inf"), float("-inf"), maximum + tl.log(total))


@jit
def as_reference(lse):
    """A log-sum-exp to subtract: +inf for an empty sum, so that every probability under it is 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse)


@kernel("out")
def inverse_norms(
    embeddings, stride_g, stride_n, stride_d, out, tokens, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """One program: `BLOCK_ROWS` tokens of one layer."""
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    line = embeddings + group * stride_g + row[:, None] * stride_n
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, width, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        mask = (row < tokens)[:, None] & (column < width)[None, :]
        e = tl.load(line + column[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(e * e, 1)
    norm = tl.sqrt_rn(total)
    inverse = tl.where(norm > SMALLEST_NORM, tl.div_rn(1.0, tl.maximum(norm, SMALLEST_NORM)), LARGEST_INVERSE)
    inverse = tl.where(norm != norm, norm, inverse)  # NaN stays NaN
    tl.store(out + group * tokens + row, inverse, mask=row < tokens)


@kernel("out")
def project_gradient(
    gradient, gradient_g, gradient_n, gradient_d, embeddings, stride_g, stride_n, stride_d, inverse_norm, inverse_g,
    out, out_g, out_n, out_d, tokens, width, limit, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    """One program: `BLOCK_ROWS` tokens of one layer. Two passes over the columns: `e_hat . u`, then the tangent."""
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < tokens
    inverse = tl.load(inverse_norm + group * inverse_g + row, mask=row_mask, other=0.0)
    gradient += group * gradient_g + row[:, None] * gradient_n
    embeddings += group * stride_g + row[:, None] * stride_n
    out += group * out_g + row[:, None] * out_n
    radial = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, width, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        mask = row_mask[:, None] & (column < width)[None, :]
        u = tl.load(gradient + column[None, :] * gradient_d, mask=mask, other=0.0).to(tl.float32)
        e = tl.load(embeddings + column[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
        radial += tl.sum(e * inverse[:, None] * u, 1)
    radial = tl.where(inverse >= LARGEST_INVERSE, 0.0, radial)
    for start in range(0, width, BLOCK_COLUMNS):  # the second reading comes from the cache
        column = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        mask = row_mask[:, None] & (column < width)[None, :]
        u = tl.load(gradient + column[None, :] * gradient_d, mask=mask, other=0.0).to(tl.float32)
        e = tl.load(embeddings + column[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
        tangent = u - radial[:, None] * (e * inverse[:, None])
        tangent = tl.clamp(tangent, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out + column[None, :] * out_d, tangent.to(out.dtype.element_ty), mask=mask)


@kernel("lse", "known_lse", "expected", "best", "peak")
def frame_statistics(
    similarity, stride_g, stride_r, stride_n, row_scale, row_scale_g, token_scale, token_scale_g, temperature,
    own_token, frame_offsets, values, values_n, known, run_start, longest,
    lse, known_lse, expected, best, peak, rows, frames,
    VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr, EVERY_FRAME: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_ROWS` rows against one frame. Frames run fastest, so neighbours share cache lines.

    `own_token` is None where a row's own token is a candidate, too. `run_start` is None where expected values are
    needed for every row and frame; otherwise they are computed only where the row has a match in the frame.
    """
    group = tl.program_id(1).to(tl.int64)
    frame = tl.program_id(0).to(tl.int64) % frames
    row = tl.program_id(0).to(tl.int64) // frames * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < rows
    begin = tl.load(frame_offsets + frame)
    end = tl.load(frame_offsets + frame + 1)
    matched = row_mask
    if run_start is not None:
        run = run_start + row * longest + frame
        matched = tl.load(run + 1, mask=row_mask, other=0) > tl.load(run, mask=row_mask, other=0)
    any_matched = tl.max(matched.to(tl.int32), 0) > 0
    if not EVERY_FRAME:
        end = tl.where(any_matched, end, begin)  # no match, no column to read

    tau = tl.load(temperature)
    scale = tl.load(row_scale + group * row_scale_g + row, mask=row_mask, other=0.0)
    line = similarity + group * stride_g + row[:, None] * stride_r
    if own_token is not None:
        own = tl.load(own_token + row, mask=row_mask, other=-1)
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    known_maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    known_total = tl.zeros([BLOCK_ROWS], tl.float32)
    slot = tl.arange(0, PADDED_VALUES)
    weighted = tl.zeros([BLOCK_ROWS, PADDED_VALUES], tl.float32)
    best_column = tl.full([BLOCK_ROWS], -1, tl.int64)
    for start in range(begin, end, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        column_mask = column < end
        x = tl.load(line + column[None, :] * stride_n, mask=row_mask[:, None] & column_mask[None, :], other=0.0)
        norm = tl.load(token_scale + group * token_scale_g + column, mask=column_mask, other=0.0)
        candidate = column_mask[None, :]
        if own_token is not None:
            candidate = candidate & (column[None, :] != own[:, None])
        s = tl.where(candidate, scaled_similarity(x, scale, norm, tau), float("-inf"))
        block_maximum = tl.max(s, 1)
        offset = tl.arange(0, BLOCK_COLUMNS)[None, :]
        block_best = tl.min(tl.where(s == block_maximum[:, None], offset, BLOCK_COLUMNS), 1)
        best_column = tl.where(block_maximum > maximum, start + block_best, best_column)
        maximum, total, _, _ = softmax_step(s, maximum, total)
        if VALUES > 0:  # noqa: SIM102 - this one is decided by the compiler, the next by the data
            if any_matched:
                is_known = tl.load(known + column, mask=column_mask, other=0) != 0
                known_s = tl.where(is_known[None, :], s, float("-inf"))
                known_maximum, known_total, weight, shrink = softmax_step(known_s, known_maximum, known_total)
                weighted *= shrink[:, None]
                for v in tl.static_range(VALUES):
                    value = tl.load(values + column * values_n + v, mask=column_mask & is_known, other=0.0)
                    part = tl.sum(weight * value[None, :], 1)
                    weighted += tl.where(slot[None, :] == v, part[:, None], 0.0)

    cell = (group * rows + row) * frames + frame
    frame_lse = log_sum_exp(maximum, total)
    if not EVERY_FRAME:
        frame_lse = tl.where(matched, frame_lse, float("-inf"))
        maximum = tl.where(matched, maximum, float("-inf"))
        best_column = tl.where(matched, best_column, -1)
    tl.store(lse + cell, frame_lse, mask=row_mask)
    tl.store(peak + cell, maximum, mask=row_mask)
    tl.store(best + cell, best_column, mask=row_mask)
    frame_known_lse = log_sum_exp(known_maximum, known_total)
    tl.store(known_lse + cell, tl.where(matched, frame_known_lse, float("-inf")), mask=row_mask)
    if VALUES > 0:
        mean = weighted / tl.where(known_total == 0.0, 1.0, known_total)[:, None]
        mean = tl.where(matched[:, None], mean, 0.0)
        mask = row_mask[:, None] & (slot < VALUES)[None, :]
        tl.store(expected + cell[:, None] * VALUES + slot[None, :], mean, mask=mask)


@kernel("corr_term", "depth_term", "best_term", "confidence_term", "upstream_lse", "upstream_expected")
def loss_terms(
    similarity, stride_g, stride_r, stride_n, row_scale, row_scale_g, token_scale, token_scale_g, temperature,
    positive, positive_g, lse, expected, best, peak,
    run_start, longest, order, target, depth, has_depth, first_token,
    corr_weight, corr_weight_g, corr_weight_m, depth_weight, depth_weight_g, depth_weight_m,
    corr_term, depth_term, best_term, confidence_term, term_g, upstream_lse, upstream_expected, rows, frames, eps,
    VALUES: tl.constexpr, SEQUENCE_NEGATIVES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: one row, its matches `BLOCK_ROWS` at a time, its frames `BLOCK_COLUMNS` at a time.

    The similarity of a match is read from `positive`, or, where that is None, computed from `similarity`. The weights
    and the upstream gradients are None where only the terms are needed.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    cell = (group * rows + row) * frames
    starts = run_start + row * longest
    if positive is None:
        tau = tl.load(temperature)

    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    if SEQUENCE_NEGATIVES:
        for start in range(0, frames, BLOCK_COLUMNS):
            frame = start + tl.arange(0, BLOCK_COLUMNS)
            block_lse = tl.load(lse + cell + frame, mask=frame < frames, other=float("-inf"))
            maximum, total, _, _ = softmax_step(block_lse[None, :], maximum, total)
    sequence_lse = tl.max(log_sum_exp(maximum, total), 0)

    row_weight = 0.0  # sum of the corr weights of this row's matches
    for start in range(0, frames, BLOCK_COLUMNS):
        frame = start + tl.arange(0, BLOCK_COLUMNS)
        frame_mask = frame < frames
        frame_begin = tl.load(starts + frame, mask=frame_mask, other=0)
        frame_end = tl.load(starts + frame + 1, mask=frame_mask, other=0)
        frame_weight = tl.zeros([BLOCK_COLUMNS], tl.float32)
        depth_slopes = tl.zeros([BLOCK_COLUMNS], tl.float32)
        first = tl.load(starts + start)
        last = tl.load(starts + tl.minimum(start + BLOCK_COLUMNS, frames))
        for block in range(first, last, BLOCK_ROWS):
            position = block + tl.arange(0, BLOCK_ROWS).to(tl.int64)  # of sorted matches
            mask = position < last
            in_frame = (position[:, None] >= frame_begin[None, :]) & (position[:, None] < frame_end[None, :])
            in_frame = in_frame & mask[:, None]
            match_frame = tl.max(tl.where(in_frame, frame[None, :], 0), 1)
            match = tl.load(order + position, mask=mask, other=0)
            if positive is not None:
                s = tl.load(positive + group * positive_g + position, mask=mask, other=0.0)
            else:
                column = tl.load(target + position, mask=mask, other=0) - first_token
                x = tl.load(similarity + group * stride_g + row * stride_r + column * stride_n, mask=mask, other=0.0)
                norm = tl.load(token_scale + group * token_scale_g + column, mask=mask, other=0.0)
                s = x * tl.load(row_scale + group * row_scale_g + row) * norm / tau
            frame_lse = tl.load(lse + cell + match_frame, mask=mask, other=0.0)
            normaliser = sequence_lse if SEQUENCE_NEGATIVES else frame_lse
            out = group * term_g + match
            tl.store(corr_term + out, normaliser - s, mask=mask)
            best_column = tl.load(best + cell + match_frame, mask=mask, other=0)
            tl.store(best_term + out, best_column + first_token, mask=mask)
            confidence = tl.exp(tl.load(peak + cell + match_frame, mask=mask, other=0.0) - frame_lse)
            tl.store(confidence_term + out, confidence, mask=mask)
            has_term = mask & (tl.load(has_depth + position, mask=mask, other=0) != 0)
            relative_error = tl.zeros([BLOCK_ROWS], tl.float32)
            depth_slope = tl.zeros([BLOCK_ROWS], tl.float32)  # derivative of the depth term by the expected depth
            if VALUES > 0:
                true_depth = tl.load(depth + position, mask=has_term, other=0.0)
                expected_depth = tl.load(expected + (cell + match_frame) * VALUES, mask=has_term, other=0.0)
                size = tl.where(has_term, true_depth + expected_depth + eps, 1.0)
                relative_error = tl.where(has_term, tl.abs(true_depth - expected_depth) / size, 0.0)
                sign = tl.where(true_depth > expected_depth, 1.0, 0.0) - tl.where(true_depth < expected_depth, 1.0, 0.0)
                depth_slope = tl.where(has_term, -(sign + relative_error) / size, 0.0)
            tl.store(depth_term + out, relative_error, mask=mask)
            if corr_weight is not None:
                pull = tl.load(corr_weight + group * corr_weight_g + match * corr_weight_m, mask=mask, other=0.0)
                weight_at = depth_weight + group * depth_weight_g + match * depth_weight_m
                weight = tl.load(weight_at, mask=has_term, other=0.0)
                row_weight += tl.sum(pull, 0)
                frame_weight += tl.sum(tl.where(in_frame, pull[:, None], 0.0), 0)
                depth_slopes += tl.sum(tl.where(in_frame, (weight * depth_slope)[:, None], 0.0), 0)
        if corr_weight is not None:
            if not SEQUENCE_NEGATIVES:
                tl.store(upstream_lse + cell + frame, frame_weight, mask=frame_mask)
            for v in tl.static_range(VALUES):
                slopes = depth_slopes if v == 0 else tl.zeros([BLOCK_COLUMNS], tl.float32)
                tl.store(upstream_expected + (cell + frame) * VALUES + v, slopes, mask=frame_mask)
    if corr_weight is not None and SEQUENCE_NEGATIVES:
        for start in range(0, frames, BLOCK_COLUMNS):
            frame = start + tl.arange(0, BLOCK_COLUMNS)
            block_lse = tl.load(lse + cell + frame, mask=frame < frames, other=float("-inf"))
            share = tl.where(block_lse == float("-inf"), 0.0, tl.exp(block_lse - sequence_lse))
            tl.store(upstream_lse + cell + frame, row_weight * share, mask=frame < frames)


@kernel("out")
def similarity_gradient(
    similarity, stride_g, stride_r, stride_n, row_scale, row_scale_g, token_scale, token_scale_g, temperature,
    own_token, frame_offsets, values, values_n, known, lse, known_lse, expected, upstream_lse, upstream_expected,
    run_start, longest, order, target, first_token, corr_weight, corr_weight_g, corr_weight_m,
    out, out_g, out_r, out_n, rows, frames, limit,
    VALUES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_ROWS` rows against one frame. The same program reads each similarity before it writes there,
    so `out` may be the memory of `similarity`.

    The arguments from `run_start` to `corr_weight_m` are None where there are no matches.
    """
    group = tl.program_id(1).to(tl.int64)
    frame = tl.program_id(0).to(tl.int64) % frames
    row = tl.program_id(0).to(tl.int64) // frames * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < rows
    begin = tl.load(frame_offsets + frame)
    end = tl.load(frame_offsets + frame + 1)
    tau = tl.load(temperature)
    cell = (group * rows + row) * frames + frame
    reference = as_reference(tl.load(lse + cell, mask=row_mask, other=float("-inf")))
    known_reference = as_reference(tl.load(known_lse + cell, mask=row_mask, other=float("-inf")))
    a = tl.load(upstream_lse + cell, mask=row_mask, other=0.0)
    scale = tl.load(row_scale + group * row_scale_g + row, mask=row_mask, other=0.0)
    if own_token is not None:
        own = tl.load(own_token + row, mask=row_mask, other=-1)
    center = tl.zeros([BLOCK_ROWS], tl.float32)  # sum_v b_v E_v
    for v in tl.static_range(VALUES):
        b = tl.load(upstream_expected + cell * VALUES + v, mask=row_mask, other=0.0)
        center += b * tl.load(expected + cell * VALUES + v, mask=row_mask, other=0.0)
    if run_start is not None:
        first = tl.load(run_start + row * longest + frame, mask=row_mask, other=0)
        last = tl.load(run_start + row * longest + frame + 1, mask=row_mask, other=0)
        longest_run = tl.max((last - first).to(tl.int32), 0)

    similarity += group * stride_g + row[:, None] * stride_r
    out += group * out_g + row[:, None] * out_r
    for start in range(begin, end, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        column_mask = column < end
        mask = row_mask[:, None] & column_mask[None, :]
        x = tl.load(similarity + column[None, :] * stride_n, mask=mask, other=0.0)
        norm = tl.load(token_scale + group * token_scale_g + column, mask=column_mask, other=0.0)
        s = scaled_similarity(x, scale, norm, tau)
        if own_token is not None:
            s = tl.where(column[None, :] != own[:, None], s, float("-inf"))
        gradient = a[:, None] * tl.exp(s - reference[:, None])
        if VALUES > 0:
            is_known = tl.load(known + column, mask=column_mask, other=0) != 0
            value_pull = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32) - center[:, None]  # sum_v b_v (v_k - E_v)
            for v in tl.static_range(VALUES):
                b = tl.load(upstream_expected + cell * VALUES + v, mask=row_mask, other=0.0)
                value = tl.load(values + column * values_n + v, mask=column_mask & is_known, other=0.0)
                value_pull += b[:, None] * value[None, :]
            known_log = tl.where(is_known[None, :], s - known_reference[:, None], float("-inf"))
            gradient += value_pull * tl.exp(known_log)
        if run_start is not None:
            for k in range(longest_run):
                in_run = first + k < last
                match = tl.load(order + first + k, mask=in_run, other=0)
                pulled = tl.load(target + first + k, mask=in_run, other=-1) - first_token
                weight_at = corr_weight + group * corr_weight_g + match * corr_weight_m
                weight = tl.load(weight_at, mask=in_run, other=0.0)
                hit = in_run[:, None] & (column[None, :] == pulled[:, None])
                gradient = tl.where(hit, gradient - weight[:, None], gradient)
        gradient = scaled_similarity(gradient, scale, norm, tau)
        gradient = tl.clamp(gradient, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out + column[None, :] * out_n, gradient.to(out.dtype.element_ty), mask=mask)

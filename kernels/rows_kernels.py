# mypy: disallow-untyped-defs=False
"""The device side of `rows_triton`: one Triton kernel for each row operation of `rows_torch`.

Nothing is accumulated across programs: a program owns some rows of one frame of one layer (or some rows of a matrix),
walks the columns from left to right, and writes results that no other program writes. So there are no atomics, the
order of every sum is fixed, and equal inputs give equal bits.

The recurrence over the column blocks of a frame is the usual one. With `m` the maximum so far and `z` the sum of
`exp(s - m)` so far, a block with maximum `m'` gives `M = max(m, m')`, `z <- z exp(m - M) + sum exp(s - M)`, `m <- M`;
every exponent is <= 0, hence nothing overflows, and the largest term is exactly 1, hence nothing is lost but terms
below 2^-24 of it. Tokens of known value have a second `m` and `z`: they may all lie far below the others, and then
their sum under the common maximum would vanish. A row without tokens keeps `m = -inf`, `z = 0`; where that is used as
a reference it is replaced by 0, so that `exp(-inf - 0) = 0` stands where `-inf - -inf` would give NaN.

`best` moves only to a strictly larger maximum, and within a block it is the least index that reaches it: the first of
equals. All addresses are 64-bit. The temperature is read where it lies, on the device.
"""

from __future__ import annotations

from .triton_launch import jit, tl


@jit
def scaled_similarity(x, row_scale, token_scale, temperature):
    """`s` from raw dot products; dividing last, in the order of `rows_torch`."""
    return x * row_scale[:, None] * token_scale[None, :] / temperature


@jit
def softmax_step(s, top, total):
    """One block of the recurrence: the new maximum and sum, the block's weights, and what old sums shrink by."""
    new_top = tl.maximum(top, tl.max(s, 1))
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp(s - reference[:, None])
    shrink = tl.exp(top - reference)
    return new_top, total * shrink + tl.sum(weight, 1), weight, shrink


@jit
def log_or_nothing(top, total):
    """`log sum exp`; -inf for an empty sum."""
    return tl.where(top == float("-inf"), float("-inf"), top + tl.log(total))


@jit
def as_reference(lse):
    """A log-sum-exp to subtract: +inf for an empty sum, so that every probability under it is 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse)


@jit
def inverse_norms(
    embeddings, stride_g, stride_n, stride_d, out, tokens, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    line = embeddings + group * stride_g + row[:, None] * stride_n
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, width, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        inside = (row < tokens)[:, None] & (column < width)[None, :]
        e = tl.load(line + column[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(e * e, 1)
    norm = tl.sqrt_rn(total)
    inverse = tl.where(norm > 1e-12, tl.div_rn(1.0, tl.maximum(norm, 1e-12)), 1e12)
    inverse = tl.where(norm != norm, norm, inverse)
    tl.store(out + group * tokens + row, inverse, mask=row < tokens)


@jit
def project_gradient(
    gradient, gradient_g, gradient_n, gradient_d, embeddings, stride_g, stride_n, stride_d, inverse_norm, inverse_g,
    out, out_g, out_n, out_d, tokens, width, limit, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = row < tokens
    inverse = tl.load(inverse_norm + group * inverse_g + row, mask=here, other=0.0)
    gradient += group * gradient_g + row[:, None] * gradient_n
    embeddings += group * stride_g + row[:, None] * stride_n
    out += group * out_g + row[:, None] * out_n
    radial = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, width, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        inside = here[:, None] & (column < width)[None, :]
        u = tl.load(gradient + column[None, :] * gradient_d, mask=inside, other=0.0).to(tl.float32)
        e = tl.load(embeddings + column[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)
        radial += tl.sum(e * inverse[:, None] * u, 1)
    radial = tl.where(inverse >= 1e12, 0.0, radial)
    for start in range(0, width, BLOCK_COLUMNS):  # the second reading comes from the cache
        column = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        inside = here[:, None] & (column < width)[None, :]
        u = tl.load(gradient + column[None, :] * gradient_d, mask=inside, other=0.0).to(tl.float32)
        e = tl.load(embeddings + column[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)
        tangent = u - radial[:, None] * (e * inverse[:, None])
        tangent = tl.clamp(tangent, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out + column[None, :] * out_d, tangent.to(out.dtype.element_ty), mask=inside)


@jit
def frame_statistics(
    similarity, stride_g, stride_r, stride_n, row_scale, row_scale_g, token_scale, token_scale_g, temperature,
    own_token, frame_offsets, values, values_n, known, run_start, longest,
    lse, known_lse, expected, best, peak, rows, frames,
    EXCLUDE_OWN: tl.constexpr, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, BY_RUN: tl.constexpr,
    EVERY_FRAME: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_ROWS` rows against one frame. Frames run fastest, so neighbours share cache lines."""
    group = tl.program_id(1).to(tl.int64)
    frame = tl.program_id(0).to(tl.int64) % frames
    row = tl.program_id(0).to(tl.int64) // frames * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = row < rows
    begin = tl.load(frame_offsets + frame)
    end = tl.load(frame_offsets + frame + 1)
    matched = here
    if BY_RUN:
        cell = run_start + row * longest + frame
        matched = tl.load(cell + 1, mask=here, other=0) > tl.load(cell, mask=here, other=0)
    any_matched = tl.max(matched.to(tl.int32), 0) > 0
    if not EVERY_FRAME:
        end = tl.where(any_matched, end, begin)  # nothing asked, nothing read

    tau = tl.load(temperature)
    scale = tl.load(row_scale + group * row_scale_g + row, mask=here, other=0.0)
    line = similarity + group * stride_g + row[:, None] * stride_r
    own = tl.load(own_token + row, mask=here, other=-1)
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    known_top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    known_total = tl.zeros([BLOCK_ROWS], tl.float32)
    slot = tl.arange(0, PADDED_WIDTH)
    weighted = tl.zeros([BLOCK_ROWS, PADDED_WIDTH], tl.float32)
    first_best = tl.full([BLOCK_ROWS], -1, tl.int64)
    for start in range(begin, end, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        inside = column < end
        x = tl.load(line + column[None, :] * stride_n, mask=here[:, None] & inside[None, :], other=0.0)
        norm = tl.load(token_scale + group * token_scale_g + column, mask=inside, other=0.0)
        counted = inside[None, :]
        if EXCLUDE_OWN:
            counted = counted & (column[None, :] != own[:, None])
        s = tl.where(counted, scaled_similarity(x, scale, norm, tau), float("-inf"))
        block_top = tl.max(s, 1)
        offset = tl.arange(0, BLOCK_COLUMNS)[None, :]
        block_best = tl.min(tl.where(s == block_top[:, None], offset, BLOCK_COLUMNS), 1)
        first_best = tl.where(block_top > top, start + block_best, first_best)
        top, total, _, _ = softmax_step(s, top, total)
        if WIDTH > 0:  # noqa: SIM102 - this one is decided by the compiler, the next by the data
            if any_matched:
                is_known = tl.load(known + column, mask=inside, other=0) != 0
                among = tl.where(is_known[None, :], s, float("-inf"))
                known_top, known_total, weight, shrink = softmax_step(among, known_top, known_total)
                weighted *= shrink[:, None]
                for v in tl.static_range(WIDTH):
                    value = tl.load(values + column * values_n + v, mask=inside & is_known, other=0.0)
                    part = tl.sum(weight * value[None, :], 1)
                    weighted += tl.where(slot[None, :] == v, part[:, None], 0.0)

    at = (group * rows + row) * frames + frame
    frame_lse = log_or_nothing(top, total)
    if not EVERY_FRAME:
        frame_lse = tl.where(matched, frame_lse, float("-inf"))
        top = tl.where(matched, top, float("-inf"))
        first_best = tl.where(matched, first_best, -1)
    tl.store(lse + at, frame_lse, mask=here)
    tl.store(peak + at, top, mask=here)
    tl.store(best + at, first_best, mask=here)
    known_log = log_or_nothing(known_top, known_total)
    tl.store(known_lse + at, tl.where(matched, known_log, float("-inf")), mask=here)
    if WIDTH > 0:
        mean = weighted / tl.where(known_total == 0.0, 1.0, known_total)[:, None]
        mean = tl.where(matched[:, None], mean, 0.0)
        tl.store(expected + at[:, None] * WIDTH + slot[None, :], mean, mask=here[:, None] & (slot < WIDTH)[None, :])


@jit
def match_terms(
    similarity, stride_g, stride_r, stride_n, row_scale, row_scale_g, token_scale, token_scale_g, temperature,
    positive, positive_g, lse, known_expected, best, peak, run_start, longest, order, target, depth, counts,
    first_token, corr_scale, corr_scale_g, corr_scale_m, depth_scale, depth_scale_g, depth_scale_m,
    corr_term, depth_term, best_term, confidence_term, term_g, upstream_lse, upstream_expected, rows, frames, eps,
    WIDTH: tl.constexpr, SEQUENCE_NEGATIVES: tl.constexpr, WITH_SCALES: tl.constexpr, POSITIVE_GIVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: one row, its matches `BLOCK_ROWS` at a time, its frames `BLOCK_COLUMNS` at a time."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    cell = (group * rows + row) * frames
    starts = run_start + row * longest
    tau = tl.load(temperature)

    whole_top = tl.full([1], float("-inf"), tl.float32)
    whole_total = tl.zeros([1], tl.float32)
    if SEQUENCE_NEGATIVES:
        for start in range(0, frames, BLOCK_COLUMNS):
            frame = start + tl.arange(0, BLOCK_COLUMNS)
            part = tl.load(lse + cell + frame, mask=frame < frames, other=float("-inf"))
            whole_top, whole_total, _, _ = softmax_step(part[None, :], whole_top, whole_total)
    whole = tl.max(log_or_nothing(whole_top, whole_total), 0)

    row_corr = 0.0  # sum of this row's corr scales
    for start in range(0, frames, BLOCK_COLUMNS):
        frame = start + tl.arange(0, BLOCK_COLUMNS)
        frame_here = frame < frames
        frame_begin = tl.load(starts + frame, mask=frame_here, other=0)
        frame_end = tl.load(starts + frame + 1, mask=frame_here, other=0)
        frame_corr = tl.zeros([BLOCK_COLUMNS], tl.float32)
        frame_slope = tl.zeros([BLOCK_COLUMNS], tl.float32)
        first = tl.load(starts + start)
        last = tl.load(starts + tl.minimum(start + BLOCK_COLUMNS, frames))
        for block in range(first, last, BLOCK_ROWS):
            at = block + tl.arange(0, BLOCK_ROWS).to(tl.int64)
            here = at < last
            member = (at[:, None] >= frame_begin[None, :]) & (at[:, None] < frame_end[None, :]) & here[:, None]
            mine = tl.max(tl.where(member, frame[None, :], 0), 1)  # the frame of each match
            match = tl.load(order + at, mask=here, other=0)
            if POSITIVE_GIVEN:
                s = tl.load(positive + group * positive_g + at, mask=here, other=0.0)
            else:
                column = tl.load(target + at, mask=here, other=0) - first_token
                x = tl.load(similarity + group * stride_g + row * stride_r + column * stride_n, mask=here, other=0.0)
                norm = tl.load(token_scale + group * token_scale_g + column, mask=here, other=0.0)
                s = x * tl.load(row_scale + group * row_scale_g + row) * norm / tau
            frame_lse = tl.load(lse + cell + mine, mask=here, other=0.0)
            normaliser = whole if SEQUENCE_NEGATIVES else frame_lse
            out = group * term_g + match
            tl.store(corr_term + out, normaliser - s, mask=here)
            tl.store(best_term + out, tl.load(best + cell + mine, mask=here, other=0) + first_token, mask=here)
            confidence = tl.exp(tl.load(peak + cell + mine, mask=here, other=0.0) - frame_lse)
            tl.store(confidence_term + out, confidence, mask=here)
            counted = here & (tl.load(counts + at, mask=here, other=0) != 0)
            gap = tl.zeros([BLOCK_ROWS], tl.float32)
            slope = tl.zeros([BLOCK_ROWS], tl.float32)
            if WIDTH > 0:
                wanted = tl.load(depth + at, mask=counted, other=0.0)
                found = tl.load(known_expected + (cell + mine) * WIDTH, mask=counted, other=0.0)
                size = tl.where(counted, wanted + found + eps, 1.0)
                gap = tl.where(counted, tl.abs(wanted - found) / size, 0.0)
                sign = tl.where(wanted > found, 1.0, 0.0) - tl.where(wanted < found, 1.0, 0.0)
                slope = tl.where(counted, -(sign + gap) / size, 0.0)
            tl.store(depth_term + out, gap, mask=here)
            if WITH_SCALES:
                pull = tl.load(corr_scale + group * corr_scale_g + match * corr_scale_m, mask=here, other=0.0)
                weight = tl.load(depth_scale + group * depth_scale_g + match * depth_scale_m, mask=counted, other=0.0)
                row_corr += tl.sum(pull, 0)
                frame_corr += tl.sum(tl.where(member, pull[:, None], 0.0), 0)
                frame_slope += tl.sum(tl.where(member, (weight * slope)[:, None], 0.0), 0)
        if WITH_SCALES:
            if not SEQUENCE_NEGATIVES:
                tl.store(upstream_lse + cell + frame, frame_corr, mask=frame_here)
            for v in tl.static_range(WIDTH):
                slopes = frame_slope if v == 0 else tl.zeros([BLOCK_COLUMNS], tl.float32)
                tl.store(upstream_expected + (cell + frame) * WIDTH + v, slopes, mask=frame_here)
    if WITH_SCALES and SEQUENCE_NEGATIVES:
        for start in range(0, frames, BLOCK_COLUMNS):
            frame = start + tl.arange(0, BLOCK_COLUMNS)
            part = tl.load(lse + cell + frame, mask=frame < frames, other=float("-inf"))
            share = tl.where(part == float("-inf"), 0.0, tl.exp(part - whole))
            tl.store(upstream_lse + cell + frame, row_corr * share, mask=frame < frames)


@jit
def similarity_gradient(
    similarity, stride_g, stride_r, stride_n, row_scale, row_scale_g, token_scale, token_scale_g, temperature,
    own_token, frame_offsets, values, values_n, known, lse, known_lse, expected, upstream_lse, upstream_expected,
    run_start, longest, order, target, first_token, corr_scale, corr_scale_g, corr_scale_m,
    out, out_g, out_r, out_n, rows, frames, limit,
    EXCLUDE_OWN: tl.constexpr, WIDTH: tl.constexpr, WITH_MATCHES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_ROWS` rows against one frame. A number is read before it is written, by the same program,
    so `out` may lie where `similarity` lies."""
    group = tl.program_id(1).to(tl.int64)
    frame = tl.program_id(0).to(tl.int64) % frames
    row = tl.program_id(0).to(tl.int64) // frames * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = row < rows
    begin = tl.load(frame_offsets + frame)
    end = tl.load(frame_offsets + frame + 1)
    tau = tl.load(temperature)
    at = (group * rows + row) * frames + frame
    reference = as_reference(tl.load(lse + at, mask=here, other=float("-inf")))
    known_reference = as_reference(tl.load(known_lse + at, mask=here, other=float("-inf")))
    a = tl.load(upstream_lse + at, mask=here, other=0.0)
    scale = tl.load(row_scale + group * row_scale_g + row, mask=here, other=0.0)
    own = tl.load(own_token + row, mask=here, other=-1)
    center = tl.zeros([BLOCK_ROWS], tl.float32)  # sum_v b_v E_v
    for v in tl.static_range(WIDTH):
        b = tl.load(upstream_expected + at * WIDTH + v, mask=here, other=0.0)
        center += b * tl.load(expected + at * WIDTH + v, mask=here, other=0.0)
    first = tl.zeros([BLOCK_ROWS], tl.int64)
    last = tl.zeros([BLOCK_ROWS], tl.int64)
    if WITH_MATCHES:
        first = tl.load(run_start + row * longest + frame, mask=here, other=0)
        last = tl.load(run_start + row * longest + frame + 1, mask=here, other=0)
    longest_run = tl.max((last - first).to(tl.int32), 0)

    similarity += group * stride_g + row[:, None] * stride_r
    out += group * out_g + row[:, None] * out_r
    for start in range(begin, end, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        inside = column < end
        both = here[:, None] & inside[None, :]
        x = tl.load(similarity + column[None, :] * stride_n, mask=both, other=0.0)
        norm = tl.load(token_scale + group * token_scale_g + column, mask=inside, other=0.0)
        s = scaled_similarity(x, scale, norm, tau)
        if EXCLUDE_OWN:
            s = tl.where(column[None, :] != own[:, None], s, float("-inf"))
        gradient = a[:, None] * tl.exp(s - reference[:, None])
        if WIDTH > 0:
            is_known = tl.load(known + column, mask=inside, other=0) != 0
            pull = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32) - center[:, None]
            for v in tl.static_range(WIDTH):
                b = tl.load(upstream_expected + at * WIDTH + v, mask=here, other=0.0)
                value = tl.load(values + column * values_n + v, mask=inside & is_known, other=0.0)
                pull += b[:, None] * value[None, :]
            among = tl.where(is_known[None, :], s - known_reference[:, None], float("-inf"))
            gradient += pull * tl.exp(among)
        if WITH_MATCHES:
            for k in range(longest_run):
                mine = first + k < last
                match = tl.load(order + first + k, mask=mine, other=0)
                pulled = tl.load(target + first + k, mask=mine, other=-1) - first_token
                weight = tl.load(corr_scale + group * corr_scale_g + match * corr_scale_m, mask=mine, other=0.0)
                hit = mine[:, None] & (column[None, :] == pulled[:, None])
                gradient = tl.where(hit, gradient - weight[:, None], gradient)
        gradient = scaled_similarity(gradient, scale, norm, tau)
        gradient = tl.clamp(gradient, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out + column[None, :] * out_n, gradient.to(out.dtype.element_ty), mask=both)

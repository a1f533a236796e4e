# mypy: disallow-untyped-defs=False
"""The device side of `narrow_triton`: similarities that never leave the chip.

Each kernel keeps one tile of embeddings and walks over the others, as flash attention does: a tile of dot products is
made on the tensor cores, used in registers, and forgotten. What is made from it:

    statistics       rows x one frame          lse, lse of the known, expected values, arg-max      one product
    row_gradient     rows x their sequence     dA_i = sum_k X_ik e_k, accumulated on chip           two products
    token_gradient   tokens x their rows       dE_k = sum_i X_ik e_i, accumulated on chip           two products

with `X = dL/dx` as `rows_torch` defines it, but for the pull of each match on its target, which is sparse: `finish`
adds that, for one token at a time, to what flows into the token as a row and as a column, projects, and writes. Each
number has one writer and each sum one order: no atomics, equal bits for equal inputs. Blocks never straddle frames or
sequences; two small tables, made on the host from the plan, say where they begin and end.

Exponentials are powers of two, `exp(s - lse) = 2^(x r_i r_k c - lse log2(e))` with `c = log2(e) / tau`: the change of
base is part of the row's scale, which is multiplied in anyway. Columns beyond a block's end have the bias -inf there,
so masking costs the same instruction as adding nothing.

The tile of `X` enters the second product in the element type of the embeddings. Its rounding error is relative to each
number, so nothing is lost by scaling, but fp16 has little range: there `X` is made for *normalised* embeddings,
rounded to fp16 as they are loaded (norms would not fit), and multiplied by a power of two that puts its bound at 2^14.
In the other types embeddings stay raw and norms are part of `X`.
"""

from __future__ import annotations

from .rows_kernels import as_reference, log_or_nothing
from .triton_launch import jit, tl


@jit
def load_tile(
    embeddings, token, stride_n, stride_d, inverse, here, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    NORMALISED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Embeddings of some tokens, [B, BLOCK_WIDTH]; zero where there is none."""
    d = tl.arange(0, BLOCK_WIDTH)
    mask = here[:, None]
    if WIDTH < BLOCK_WIDTH:
        mask = mask & (d < WIDTH)[None, :]
    line = embeddings + token[:, None] * stride_n + (d.to(tl.int64) * stride_d)[None, :]
    tile = tl.load(line, mask=mask, other=0.0)
    if UPCAST:  # the interpreter does not know bfloat16
        tile = tile.to(tl.float32)
    if NORMALISED:
        tile = (tile.to(tl.float32) * inverse[:, None]).to(tile.dtype)
    return tile


@jit
def own_offset(own, start, BLOCK: tl.constexpr):
    """Where in the block that begins at `start` a token lies, or -1."""
    offset = own - start
    return tl.where((offset >= 0) & (offset < BLOCK), offset, -1).to(tl.int32)


@jit
def statistics(
    embeddings, stride_g, stride_n, stride_d, inverse_norm, tokens, temperature, row_token, row_blocks, frame_offsets,
    values, values_n, known, run_start, lse, known_lse, expected, best, peak, rows, frames,
    EXCLUDE_OWN: tl.constexpr, VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr, BY_RUN: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, NORMALISED: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: a block of rows against one frame of their sequence, in the order of `rows_kernels`' recurrence."""
    group = tl.program_id(1).to(tl.int64)
    frame = tl.program_id(0) % frames
    block = row_blocks + (tl.program_id(0) // frames).to(tl.int64) * 6
    row = tl.load(block) + tl.arange(0, BLOCK_ROWS)
    here = row < tl.load(block + 1)
    in_batch = frame_offsets + tl.load(block + 2) + frame
    exists = frame < tl.load(block + 3)
    begin = tl.load(in_batch, mask=exists, other=0)
    end = tl.load(in_batch + 1, mask=exists, other=0)
    if BY_RUN:  # only frames that some row of the block has a match in
        cell = run_start + row * frames + frame
        matched = tl.load(cell + 1, mask=here, other=0) > tl.load(cell, mask=here, other=0)
        end = tl.where(tl.max(matched.to(tl.int32), 0) > 0, end, begin)

    embeddings += group * stride_g
    inverse_norm += group * tokens
    own = tl.load(row_token + row, mask=here, other=-1)
    inverse = tl.load(inverse_norm + own, mask=here, other=0.0)
    a = load_tile(embeddings, own, stride_n, stride_d, inverse, here, WIDTH, BLOCK_WIDTH, NORMALISED, UPCAST)
    scale = 1.4426950408889634 / tl.load(temperature) * (1.0 if NORMALISED else inverse)  # [BLOCK_ROWS]
    scale = tl.broadcast_to(scale, [BLOCK_ROWS])
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    known_top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    known_total = tl.zeros([BLOCK_ROWS], tl.float32)
    slot = tl.arange(0, PADDED_VALUES)
    weighted = tl.zeros([BLOCK_ROWS, PADDED_VALUES], tl.float32)
    first_best = tl.full([BLOCK_ROWS], -1, tl.int32)  # in the frame
    offset = tl.arange(0, BLOCK_COLUMNS)
    for start in range(0, (end - begin).to(tl.int32), BLOCK_COLUMNS):
        token = begin + start + offset
        inside = token < end
        norm = tl.load(inverse_norm + token, mask=inside, other=0.0)
        e = load_tile(embeddings, token, stride_n, stride_d, norm, inside, WIDTH, BLOCK_WIDTH, NORMALISED, UPCAST)
        x = tl.dot(a, tl.trans(e), input_precision=PRECISION)
        bias = tl.where(inside, 0.0, float("-inf"))
        factor = 1.0 if NORMALISED else norm[None, :]
        s = x * scale[:, None] * factor + bias[None, :]
        if EXCLUDE_OWN:
            s = tl.where(offset[None, :] == own_offset(own, begin + start, BLOCK_COLUMNS)[:, None], float("-inf"), s)
        block_top = tl.max(s, 1)
        block_best = tl.min(tl.where(s == block_top[:, None], offset[None, :], BLOCK_COLUMNS), 1)
        first_best = tl.where(block_top > top, start + block_best, first_best)
        top, total, _, _ = softmax_step_2(s, block_top, top, total)
        if VALUES > 0:
            is_known = tl.load(known + token, mask=inside, other=0) != 0
            among = s + tl.where(is_known, 0.0, float("-inf"))[None, :]
            among_top = tl.max(among, 1)
            known_top, known_total, weight, shrink = softmax_step_2(among, among_top, known_top, known_total)
            weighted *= shrink[:, None]
            for v in tl.static_range(VALUES):
                value = tl.load(values + token * values_n + v, mask=inside & is_known, other=0.0)
                part = tl.sum(weight * value[None, :], 1)
                weighted += tl.where(slot[None, :] == v, part[:, None], 0.0)

    at = (group * rows + row) * frames + frame
    ln2 = 0.6931471805599453
    tl.store(lse + at, (log_or_nothing(top * ln2, total)), mask=here)
    tl.store(peak + at, top * ln2, mask=here)
    tl.store(best + at, tl.where(first_best < 0, -1, begin + first_best), mask=here)
    tl.store(known_lse + at, log_or_nothing(known_top * ln2, known_total), mask=here)
    if VALUES > 0:
        mean = weighted / tl.where(known_total == 0.0, 1.0, known_total)[:, None]
        tl.store(expected + at[:, None] * VALUES + slot[None, :], mean, mask=here[:, None] & (slot < VALUES)[None, :])


@jit
def softmax_step_2(s, block_top, top, total):
    """`rows_kernels.softmax_step` in powers of two, for a block whose maximum is known."""
    new_top = tl.maximum(top, block_top)
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(s - reference[:, None])
    shrink = tl.exp2(top - reference)
    return new_top, total * shrink + tl.sum(weight, 1), weight, shrink


@jit
def positives(
    embeddings, stride_g, stride_n, stride_d, inverse_norm, tokens, temperature, row_token, row, target, out, matches,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scaled similarity of each match, in float32."""
    group = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = at < matches
    embeddings += group * stride_g
    inverse_norm += group * tokens
    i = tl.load(row_token + tl.load(row + at, mask=here, other=0), mask=here, other=0)
    k = tl.load(target + at, mask=here, other=0)
    x = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        d = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        inside = here[:, None] & (d < WIDTH)[None, :]
        e_i = tl.load(embeddings + i[:, None] * stride_n + d[None, :] * stride_d, mask=inside, other=0.0)
        e_k = tl.load(embeddings + k[:, None] * stride_n + d[None, :] * stride_d, mask=inside, other=0.0)
        x += tl.sum(e_i.to(tl.float32) * e_k.to(tl.float32), 1)
    norms = tl.load(inverse_norm + i, mask=here, other=0.0) * tl.load(inverse_norm + k, mask=here, other=0.0)
    tl.store(out + group * matches + at, x * norms / tl.load(temperature), mask=here)


@jit
def row_statistics(at, here, lse, known_lse, expected, upstream_lse, upstream_expected, boost, VALUES: tl.constexpr):
    """What the gradient tile needs to know of some rows in one frame: `a`, `sum_v b_v E_v`, and both references."""
    log2e = 1.4426950408889634
    reference = as_reference(tl.load(lse + at, mask=here, other=float("-inf"))) * log2e
    known_reference = as_reference(tl.load(known_lse + at, mask=here, other=float("-inf"))) * log2e
    a = tl.load(upstream_lse + at, mask=here, other=0.0) * boost
    center = tl.zeros_like(a)
    for v in tl.static_range(VALUES):
        b = tl.load(upstream_expected + at * VALUES + v, mask=here, other=0.0) * boost
        center += b * tl.load(expected + at * VALUES + v, mask=here, other=0.0)
    return a, center, reference, known_reference


@jit
def row_gradient(
    embeddings, stride_g, stride_n, stride_d, inverse_norm, tokens, temperature, row_token, row_blocks, token_blocks,
    values, values_n, known, lse, known_lse, expected, upstream_lse, upstream_expected, boost,
    out, rows, frames,
    EXCLUDE_OWN: tl.constexpr, VALUES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    NORMALISED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: what flows into a block of rows from all tokens of their sequence."""
    group = tl.program_id(1).to(tl.int64)
    block = row_blocks + tl.program_id(0).to(tl.int64) * 6
    row = tl.load(block) + tl.arange(0, BLOCK_ROWS)
    here = row < tl.load(block + 1)
    first_block = tl.load(block + 4)
    block_count = (tl.load(block + 5) - first_block).to(tl.int32)
    embeddings += group * stride_g
    inverse_norm += group * tokens
    cell = (group * rows + row) * frames
    boosted = tl.load(boost + group)
    tau = tl.load(temperature)
    own = tl.load(row_token + row, mask=here, other=-1)
    inverse = tl.load(inverse_norm + own, mask=here, other=0.0)
    a = load_tile(embeddings, own, stride_n, stride_d, inverse, here, WIDTH, BLOCK_WIDTH, NORMALISED, UPCAST)
    scale = tl.broadcast_to(1.4426950408889634 / tau * (1.0 if NORMALISED else inverse), [BLOCK_ROWS])
    offset = tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for nth in range(block_count):
        entry = token_blocks + (first_block + nth) * 5
        start = tl.load(entry)
        token = start + offset
        inside = token < tl.load(entry + 1)
        at = cell + tl.load(entry + 2)
        norm = tl.load(inverse_norm + token, mask=inside, other=0.0)
        e = load_tile(embeddings, token, stride_n, stride_d, norm, inside, WIDTH, BLOCK_WIDTH, NORMALISED, UPCAST)
        x = tl.dot(a, tl.trans(e), input_precision=PRECISION)
        factor = 1.0 if NORMALISED else norm[None, :]
        s = x * scale[:, None] * factor + tl.where(inside, 0.0, float("-inf"))[None, :]
        if EXCLUDE_OWN:
            s = tl.where(offset[None, :] == own_offset(own, start, BLOCK_COLUMNS)[:, None], float("-inf"), s)
        weight, center, reference, known_reference = row_statistics(
            at, here, lse, known_lse, expected, upstream_lse, upstream_expected, boosted, VALUES
        )
        gradient = weight[:, None] * tl.exp2(s - reference[:, None])
        if VALUES > 0:
            is_known = tl.load(known + token, mask=inside, other=0) != 0
            pull = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32) - center[:, None]
            for v in tl.static_range(VALUES):
                b = tl.load(upstream_expected + at * VALUES + v, mask=here, other=0.0) * boosted
                value = tl.load(values + token * values_n + v, mask=inside & is_known, other=0.0)
                pull += b[:, None] * value[None, :]
            bias = tl.where(is_known, 0.0, float("-inf"))
            gradient += pull * tl.exp2(s - known_reference[:, None] + bias[None, :])
        total = tl.dot((gradient * factor).to(e.dtype), e, total, input_precision=PRECISION)

    total *= (inverse / (tau * boosted))[:, None]
    d = tl.arange(0, BLOCK_WIDTH)
    line = out + (group * rows + row)[:, None] * WIDTH + d[None, :]
    tl.store(line, total, mask=here[:, None] & (d < WIDTH)[None, :])


@jit
def token_gradient(
    embeddings, stride_g, stride_n, stride_d, inverse_norm, tokens, temperature, row_token, token_blocks,
    values, values_n, known, lse, known_lse, expected, upstream_lse, upstream_expected, boost,
    out, out_g, out_n, out_d, rows, frames,
    EXCLUDE_OWN: tl.constexpr, VALUES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    NORMALISED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: what flows into a block of tokens of one frame from all rows of their sequence.

    Here tokens are kept and rows walk by, so the tile is the transpose of the others': [tokens, rows].
    """
    group = tl.program_id(1).to(tl.int64)
    entry = token_blocks + tl.program_id(0).to(tl.int64) * 5
    start = tl.load(entry)
    token = start + tl.arange(0, BLOCK_COLUMNS)
    inside = token < tl.load(entry + 1)
    frame = tl.load(entry + 2)
    first_row = tl.load(entry + 3)
    last_row = tl.load(entry + 4)
    embeddings += group * stride_g
    inverse_norm += group * tokens
    boosted = tl.load(boost + group)
    tau = tl.load(temperature)
    norm = tl.load(inverse_norm + token, mask=inside, other=0.0)
    e = load_tile(embeddings, token, stride_n, stride_d, norm, inside, WIDTH, BLOCK_WIDTH, NORMALISED, UPCAST)
    scale = tl.broadcast_to(1.4426950408889634 / tau * (1.0 if NORMALISED else norm), [BLOCK_COLUMNS])
    offset = tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros([BLOCK_COLUMNS, BLOCK_WIDTH], tl.float32)
    for below in range(0, (last_row - first_row).to(tl.int32), BLOCK_ROWS):
        row = first_row + below + tl.arange(0, BLOCK_ROWS)
        here = row < last_row
        own = tl.load(row_token + row, mask=here, other=-1)
        inverse = tl.load(inverse_norm + own, mask=here, other=0.0)
        a = load_tile(embeddings, own, stride_n, stride_d, inverse, here, WIDTH, BLOCK_WIDTH, NORMALISED, UPCAST)
        x = tl.dot(e, tl.trans(a), input_precision=PRECISION)
        s = x * scale[:, None]
        strength = tl.broadcast_to(boosted, [BLOCK_ROWS])
        if not NORMALISED:
            s *= inverse[None, :]
            strength *= inverse  # `r_i` of the tile is a factor of all that its column is made of
        if EXCLUDE_OWN:
            s = tl.where(offset[:, None] == own_offset(own, start, BLOCK_COLUMNS)[None, :], float("-inf"), s)
        at = (group * rows + row) * frames + frame
        weight, center, reference, known_reference = row_statistics(
            at, here, lse, known_lse, expected, upstream_lse, upstream_expected, strength, VALUES
        )
        gradient = weight[None, :] * tl.exp2(s - reference[None, :])
        if VALUES > 0:
            is_known = tl.load(known + token, mask=inside, other=0) != 0
            pull = tl.zeros([BLOCK_COLUMNS, BLOCK_ROWS], tl.float32) - center[None, :]
            for v in tl.static_range(VALUES):
                b = tl.load(upstream_expected + at * VALUES + v, mask=here, other=0.0) * strength
                value = tl.load(values + token * values_n + v, mask=inside & is_known, other=0.0)
                pull += value[:, None] * b[None, :]
            bias = tl.where(is_known, 0.0, float("-inf"))
            gradient += pull * tl.exp2(s - known_reference[None, :] + bias[:, None])
        total = tl.dot(gradient.to(a.dtype), a, total, input_precision=PRECISION)

    total *= (norm / (tau * boosted))[:, None]
    d = tl.arange(0, BLOCK_WIDTH).to(tl.int64)
    line = out + group * out_g + token[:, None] * out_n + d[None, :] * out_d
    tl.store(line, total, mask=inside[:, None] & (d < WIDTH)[None, :])


@jit
def finish(
    embeddings, stride_g, stride_n, stride_d, inverse_norm, tokens, temperature, row_token, row_of_token,
    row_part, token_part, token_part_g, token_part_n, token_part_d, run_start, target, target_start, by_target,
    row_of_match, order, corr_scale, corr_scale_g, corr_scale_m, slopes, out, out_g, out_n, out_d, rows, frames, limit,
    WITH_MATCHES: tl.constexpr, WITH_TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: a few tokens. Adds their parts and the pulls of their matches, one a token at a time; projects.

    A row also notes what it says about the temperature, `e_i . dA_i`.
    """
    group = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = token < tokens
    embeddings += group * stride_g
    inverse_norm += group * tokens
    corr_scale += group * corr_scale_g
    d = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    inside = here[:, None] & (d < WIDTH)[None, :]
    line = embeddings + token[:, None] * stride_n + d[None, :] * stride_d
    e = tl.load(line, mask=inside, other=0.0).to(tl.float32)
    norm = tl.load(inverse_norm + token, mask=here, other=0.0)
    scale = norm / tl.load(temperature)
    row = tl.load(row_of_token + token, mask=here, other=-1)
    is_row = row >= 0
    line = row_part + (group * rows + row)[:, None] * WIDTH + d[None, :]
    u = tl.load(line, mask=inside & is_row[:, None], other=0.0)
    if WITH_MATCHES:  # the targets of this row
        first = tl.load(run_start + row * frames, mask=is_row, other=0)
        last = tl.load(run_start + (row + 1) * frames, mask=is_row, other=0)
        for k in range(tl.max((last - first).to(tl.int32), 0)):
            mine = first + k < last
            other = tl.load(target + first + k, mask=mine, other=0)
            match = tl.load(order + first + k, mask=mine, other=0)
            weight = scale * tl.load(corr_scale + match * corr_scale_m, mask=mine, other=0.0)
            u -= pull(embeddings, stride_n, stride_d, inverse_norm, other, weight, mine, d, inside)
    tl.store(slopes + group * rows + row, tl.sum(u * e, 1), mask=is_row)
    if WITH_TOKENS:
        line = token_part + group * token_part_g + token[:, None] * token_part_n + d[None, :] * token_part_d
        u += tl.load(line, mask=inside, other=0.0)
        if WITH_MATCHES:  # the rows that have this token as a target
            first = tl.load(target_start + token, mask=here, other=0)
            last = tl.load(target_start + token + 1, mask=here, other=0)
            for k in range(tl.max((last - first).to(tl.int32), 0)):
                mine = first + k < last
                position = tl.load(by_target + first + k, mask=mine, other=0)
                other = tl.load(row_of_match + position, mask=mine, other=0)
                other = tl.load(row_token + other, mask=mine, other=0)
                match = tl.load(order + position, mask=mine, other=0)
                weight = scale * tl.load(corr_scale + match * corr_scale_m, mask=mine, other=0.0)
                u -= pull(embeddings, stride_n, stride_d, inverse_norm, other, weight, mine, d, inside)
        unit = e * norm[:, None]
        radial = tl.where(norm >= 1e12, 0.0, tl.sum(unit * u, 1))
        u -= radial[:, None] * unit
        u = tl.clamp(u, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        line = out + group * out_g + token[:, None] * out_n + d[None, :] * out_d
        tl.store(line, u.to(out.dtype.element_ty), mask=inside)


@jit
def pull(embeddings, stride_n, stride_d, inverse_norm, other, weight, mine, d, inside):
    """`weight e_hat` of one other token for each token of the block."""
    weight *= tl.load(inverse_norm + other, mask=mine, other=0.0)
    line = embeddings + other[:, None] * stride_n + d[None, :] * stride_d
    return weight[:, None] * tl.load(line, mask=inside & mine[:, None], other=0.0).to(tl.float32)

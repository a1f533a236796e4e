# mypy: disallow-untyped-defs=False, disable-error-code="assignment"
"""The Triton kernels of `product_statistics`: similarities are computed on chip and never stored.

`product_statistics` is a matrix product whose epilogue is the row pass. One program owns a block of rows of one
sequence and a panel of its tokens, and visits the panel in blocks of columns. For each block, tensor cores compute a
tile of dot products, which stays in registers and is added to the statistics of each row:

    x = A_rows K_block^T                       a loop over the width of the embeddings, float32 result
    y = x r_i r_k log2(e) / tau                similarity in powers of two
    for each part of a frame in this block:    statistics += those of its columns

A *part* is a frame, or a slice of a long one. Blocks of columns do not begin where frames begin, so only the last block
of a panel is incomplete, whatever the sizes of the frames. A block that has columns of several parts adds them one
after the other; the statistics of a part are written in the block where it ends. `merge_parts` joins the slices.

**Exactness.** Cosines are at most 1, so `y <= c` with `c = log2(e) / tau`. While `c` is small, `2^(y - c)` lies between
`2^-2c` and 1: it neither overflows nor vanishes, and one exponential without a maximum serves the sums over all tokens
and over those of known value. Where `2 c` exceeds the range of float32, each sum refers to its own running maximum, as
in `rows_kernels`. The temperature is on the device, so the kernel decides.

`best` moves only to a strictly larger maximum, and within a block it is the least column that reaches it: the first of
equals. Each number has one writer and each sum one order: no atomics, equal bits for equal inputs.

**Registers.** The tile takes half of them. It is therefore added in `PIECES` of its columns, and nothing that depends
on columns is hoisted out of the loops over blocks and parts (`disable_licm`): the compiler would otherwise keep the
masks and offsets of all pieces alive and spill the tile.
"""

from __future__ import annotations

from .rows_kernels import LN2, LOG2E, log_add
from .triton_launch import constant, jit, kernel, tl

# The largest `c` for the bounded reference, tau = 0.024: 2^(-2 * 60) is a normal number (the least is 2^-126).
LARGEST_BOUND = constant(60.0)
NO_COLUMN = constant(2**31 - 1)

# Columns of the tables `programs`, `blocks` and `parts` (`TABLE_WIDTH` of each) and `row_blocks`; each line of a table
# is one of the named tuples of `product_statistics`. Tokens are those of the batch, ends are exclusive.
TABLE_WIDTH = constant(4)
FIRST_ROW, END_ROW, FIRST_BLOCK, END_BLOCK = constant(0), constant(1), constant(2), constant(3)
FIRST_TOKEN, END_TOKEN, FIRST_PART, END_PART = constant(0), constant(1), constant(2), constant(3)
FRAME, PLACE = constant(2), constant(3)
ROW_BLOCK_WIDTH = constant(3)
SEQUENCE = constant(2)


@jit
def reference_of(maximum, bound, small_bound):
    """What is subtracted from exponents: the bound, or the maximum so far (0 where there is none)."""
    return tl.where(small_bound, bound, tl.where(maximum == float("-inf"), 0.0, maximum))


@jit
def softmax_step(y, bound, small_bound, maximum, total):
    """One step of a softmax in powers of two: new maximum and sum, the block's weights, the factor of older sums."""
    new_maximum = tl.maximum(maximum, tl.max(y, 1))
    reference = reference_of(new_maximum, bound, small_bound)
    shrink = tl.where(small_bound, 1.0, tl.exp2(maximum - reference))
    weight = tl.exp2(y - reference[:, None])
    return new_maximum, total * shrink + tl.sum(weight, 1), weight, shrink


@jit
def log_of_sum(total, maximum, bound, small_bound):
    """The natural logarithm of a sum under its reference; -inf where it is empty."""
    return tl.where(total == 0.0, float("-inf"), (reference_of(maximum, bound, small_bound) + tl.log2(total)) * LN2)


@jit
def repeated(value, COUNT: tl.constexpr):
    """A tuple of `COUNT` times the same value."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (value,)  # noqa: RUF005 - Triton has no unpacking
    return values


@jit
def cut(x, PIECES: tl.constexpr):
    """A tuple of equal pieces of the columns of `x`; in registers, this moves nothing."""
    if PIECES == 1:
        pieces = (x,)
    else:
        pieces = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))
        if PIECES > 2:
            pieces = cut(pieces[0], PIECES // 2) + cut(pieces[1], PIECES // 2)
    return pieces


@jit
def dot_products(
    anchors, stride_d, candidates, keys_d, width,
    EVEN_WIDTH: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """[BLOCK_ROWS, BLOCK_COLUMNS] from pointers to where embeddings begin, [BLOCK_ROWS, 1] and [BLOCK_COLUMNS, 1]."""
    x = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        d = start + tl.arange(0, BLOCK_WIDTH)
        if EVEN_WIDTH:
            a = tl.load(anchors + (d * stride_d)[None, :])
            e = tl.load(candidates + (d * keys_d)[None, :])
        else:
            a = tl.load(anchors + (d * stride_d)[None, :], mask=(d < width)[None, :], other=0.0)
            e = tl.load(candidates + (d * keys_d)[None, :], mask=(d < width)[None, :], other=0.0)
        if UPCAST:  # NumPy, and so the interpreter, has no bfloat16
            a, e = a.to(tl.float32), e.to(tl.float32)
        x = tl.dot(a, tl.trans(e), x, input_precision=PRECISION)
    return x


@kernel("positive", "lse", "known_lse", "expected", "best", "peak", "negative_lse")
def product_statistics(
    embeddings, stride_g, stride_n, stride_d, row_norm, keys, keys_g, keys_n, keys_d, key_norm, temperature,
    row_token, values, programs, blocks, parts, run_start, longest, target, positive, positive_g,
    lse, known_lse, expected, best, peak, negative_lse, rows, frames, tokens, width,
    EXCLUDE_OWN: tl.constexpr, EVERY_FRAME: tl.constexpr, VALUES: tl.constexpr,
    EVEN_WIDTH: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, PIECES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: a line of `programs`, for one layer.

    `values` are NaN where a token has no known value. `run_start` is None without matches. With them, the similarity of
    each match is written to `positive`, and, unless `EVERY_FRAME`, blocks are skipped in which no row has a match.
    `negative_lse` is None unless it leaves out the targets of the row.
    """
    group = tl.program_id(1).to(tl.int64)
    line = programs + tl.program_id(0) * TABLE_WIDTH
    first_row = tl.load(line + FIRST_ROW)
    end_row = tl.load(line + END_ROW)
    first_block = tl.load(line + FIRST_BLOCK).to(tl.int32)
    end_block = tl.load(line + END_BLOCK).to(tl.int32)
    row = tl.minimum(first_row + tl.arange(0, BLOCK_ROWS), end_row - 1)  # the last row is repeated, but written once
    row_mask = first_row + tl.arange(0, BLOCK_ROWS) < end_row
    own = tl.load(row_token + row)
    bound = LOG2E / tl.load(temperature)
    small_bound = bound <= LARGEST_BOUND
    scale = tl.load(row_norm + group * tokens + own) * bound
    anchors = embeddings + group * stride_g + own[:, None] * stride_n
    own = own.to(tl.int32)
    key_norm += group * tokens

    nothing = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    zero = tl.zeros([BLOCK_ROWS], tl.float32)
    maximum, total, at = nothing, zero, tl.full([BLOCK_ROWS], -1, tl.int32)
    known_maximum, known_total, moments = nothing, zero, repeated(zero, VALUES)
    negative_maximum, negative_total = nothing, zero
    for block in tl.range(first_block, end_block, disable_licm=True):
        line = blocks + block * TABLE_WIDTH
        start = tl.load(line + FIRST_TOKEN).to(tl.int32)
        stop = tl.load(line + END_TOKEN).to(tl.int32)
        first_part = tl.load(line + FIRST_PART).to(tl.int32)
        end_part = tl.load(line + END_PART).to(tl.int32)
        inner = tl.where(stop > start, width, 0)
        if not EVERY_FRAME:
            run = run_start + row * longest
            before = tl.load(run + tl.load(parts + first_part * TABLE_WIDTH + FRAME))
            after = tl.load(run + tl.load(parts + (end_part - 1) * TABLE_WIDTH + FRAME) + 1)
            inner = tl.where(tl.max((after - before).to(tl.int32), 0) > 0, inner, 0)
        token = tl.minimum(start + tl.arange(0, BLOCK_COLUMNS), tokens - 1)  # some token that exists
        candidates = keys + group * keys_g + token[:, None].to(tl.int64) * keys_n
        x = dot_products(
            anchors, stride_d, candidates, keys_d, inner,
            EVEN_WIDTH, UPCAST, PRECISION, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH,
        )  # fmt: skip
        pieces = cut(x, PIECES)
        for part in tl.range(first_part, end_part, disable_licm=True):
            line = parts + part * TABLE_WIDTH
            begin = tl.load(line + FIRST_TOKEN).to(tl.int32)
            end = tl.load(line + END_TOKEN).to(tl.int32)
            frame = tl.load(line + FRAME)
            place = tl.load(line + PLACE)
            if begin >= start:  # the part begins in this block
                maximum, total, at = nothing, zero, tl.full([BLOCK_ROWS], -1, tl.int32)
                known_maximum, known_total, moments = nothing, zero, repeated(zero, VALUES)
                negative_maximum, negative_total = nothing, zero
            if run_start is not None:
                first = tl.load(run_start + row * longest + frame)
                last = tl.load(run_start + row * longest + frame + 1)
                longest_run = tl.max((last - first).to(tl.int32), 0)
            for p in tl.static_range(PIECES):
                piece_start = start + p * (BLOCK_COLUMNS // PIECES)
                low = tl.maximum(begin, piece_start)
                high = tl.minimum(tl.minimum(end, stop), piece_start + BLOCK_COLUMNS // PIECES)
                if low < high:
                    column = piece_start + tl.arange(0, BLOCK_COLUMNS // PIECES)
                    inside = (column >= low) & (column < high)
                    norm = tl.load(key_norm + column, mask=inside, other=0.0)
                    y = tl.where(inside[None, :], pieces[p] * scale[:, None] * norm[None, :], float("-inf"))
                    if EXCLUDE_OWN:
                        y = tl.where(column[None, :] == own[:, None], float("-inf"), y)
                    top = tl.max(y, 1)
                    where_top = tl.min(tl.where(y == top[:, None], column[None, :], NO_COLUMN), 1)
                    at = tl.where(top > maximum, where_top, at)
                    negative = y
                    if run_start is not None:
                        for k in range(longest_run):
                            in_run = first + k < last
                            hit = tl.load(target + first + k, mask=in_run, other=-1).to(tl.int32)
                            s = tl.sum(tl.where(column[None, :] == hit[:, None], y, 0.0), 1)
                            here = row_mask & in_run & (hit >= low) & (hit < high)
                            tl.store(positive + group * positive_g + first + k, s * LN2, mask=here)
                            if negative_lse is not None:
                                negative = tl.where(column[None, :] == hit[:, None], float("-inf"), negative)
                    maximum, total, weight, _ = softmax_step(y, bound, small_bound, maximum, total)
                    if negative_lse is not None:
                        negative_maximum, negative_total, _, _ = softmax_step(
                            negative, bound, small_bound, negative_maximum, negative_total
                        )
                    if VALUES > 0:
                        value = tl.load(values + column * VALUES, mask=inside, other=float("nan"))
                        known = value == value
                        if small_bound:
                            known_total += tl.sum(tl.where(known[None, :], weight, 0.0), 1)
                            moments = add_moments(moments, 1.0, weight, values, column, known, VALUES)
                        else:
                            known_y = tl.where(known[None, :], y, float("-inf"))
                            known_maximum, known_total, known_weight, shrink = softmax_step(
                                known_y, bound, small_bound, known_maximum, known_total
                            )
                            moments = add_moments(moments, shrink, known_weight, values, column, known, VALUES)

            if end <= stop:  # and ends in it
                cell = (group * rows + row) * frames + place
                matched = row_mask
                if run_start is not None:
                    matched = last > first
                written = matched | EVERY_FRAME
                some = written & (total != 0.0)
                log_total = log_of_sum(total, maximum, bound, small_bound)
                tl.store(lse + cell, tl.where(written, log_total, float("-inf")), mask=row_mask)
                tl.store(peak + cell, tl.where(some, maximum * LN2, float("-inf")), mask=row_mask)
                tl.store(best + cell, tl.where(some, at, -1).to(tl.int64), mask=row_mask)
                if negative_lse is not None:
                    log_negative = log_of_sum(negative_total, negative_maximum, bound, small_bound)
                    tl.store(negative_lse + cell, tl.where(written, log_negative, float("-inf")), mask=row_mask)
                log_known = nothing
                if VALUES > 0:
                    log_known = log_of_sum(known_total, known_maximum, bound, small_bound)
                    log_known = tl.where(matched, log_known, float("-inf"))
                    divisor = tl.where(known_total == 0.0, 1.0, known_total)
                    for v in tl.static_range(VALUES):
                        mean = tl.where(matched, moments[v] / divisor, 0.0)
                        tl.store(expected + cell * VALUES + v, mean, mask=row_mask)
                tl.store(known_lse + cell, log_known, mask=row_mask)


@jit
def add_moments(moments, shrink, weight, values, column, known, VALUES: tl.constexpr):
    """For each of the values, the old sum times `shrink`, plus the weighted sum over the columns of known value."""
    sums = ()
    for v in tl.static_range(VALUES):
        value = tl.where(known, tl.load(values + column * VALUES + v, mask=known, other=0.0), 0.0)
        sums = sums + (moments[v] * shrink + tl.sum(weight * value[None, :], 1),)  # noqa: RUF005
    return sums


@kernel("lse", "known_lse", "expected", "best", "peak", "negative_lse")
def merge_parts(
    part_lse, part_known_lse, part_expected, part_best, part_peak, part_negative_lse, part_places,
    row_blocks, places, lse, known_lse, expected, best, peak, negative_lse, rows, frames,
    VALUES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: a block of rows, one frame, one layer; its slices are merged from left to right.

    `places` [B, P + 1]: where the slices of each frame are.
    """
    group = tl.program_id(1).to(tl.int64)
    frame = tl.program_id(0) % frames
    line = row_blocks + tl.program_id(0) // frames * ROW_BLOCK_WIDTH
    row = tl.load(line + FIRST_ROW) + tl.arange(0, BLOCK_ROWS)
    mask = row < tl.load(line + END_ROW)
    place = places + tl.load(line + SEQUENCE) * (frames + 1) + frame
    first = tl.load(place)
    last = tl.load(place + 1)
    old = (group * rows + row) * part_places
    nothing = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total, known, negative, top = nothing, nothing, nothing, nothing
    at = tl.full([BLOCK_ROWS], -1, tl.int64)
    sums = repeated(tl.zeros([BLOCK_ROWS], tl.float32), VALUES)
    for part in range(first, last):
        total = log_add(total, tl.load(part_lse + old + part, mask=mask, other=0.0))
        here = tl.load(part_peak + old + part, mask=mask, other=0.0)
        at = tl.where(here > top, tl.load(part_best + old + part, mask=mask, other=0), at)
        top = tl.maximum(top, here)
        if negative_lse is not None:
            negative = log_add(negative, tl.load(part_negative_lse + old + part, mask=mask, other=0.0))
        if VALUES > 0:
            new = tl.load(part_known_lse + old + part, mask=mask, other=0.0)
            both = log_add(known, new)
            reference = tl.where(both == float("-inf"), 0.0, both)
            merged = ()
            for v in tl.static_range(VALUES):
                value = tl.load(part_expected + (old + part) * VALUES + v, mask=mask, other=0.0)
                value = sums[v] * tl.exp(known - reference) + value * tl.exp(new - reference)
                merged = merged + (value,)  # noqa: RUF005
            sums = merged
            known = both
    cell = (group * rows + row) * frames + frame
    tl.store(lse + cell, total, mask=mask)
    tl.store(known_lse + cell, known, mask=mask)
    tl.store(best + cell, at, mask=mask)
    tl.store(peak + cell, top, mask=mask)
    if negative_lse is not None:
        tl.store(negative_lse + cell, negative, mask=mask)
    for v in tl.static_range(VALUES):
        tl.store(expected + cell * VALUES + v, sums[v], mask=mask)

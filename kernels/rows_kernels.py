# mypy: disallow-untyped-defs=False
"""The Triton kernels of `rows_triton` over similarities; those over embeddings are in `vector_kernels`.

Nothing is accumulated across programs: a program owns some rows of one frame of one layer, loops over the columns from
left to right, and writes results that no other program writes. So there are no atomics, the order of every sum is
fixed, and equal inputs give equal bits.

**Softmax without a maximum.** `|cos| <= 1`, so `s <= 1 / tau` for every similarity, and with `c = log2(e) / tau`

    exp(s - 1 / tau) = 2^y,   y = x r_i r_k c - c,   -2c <= y <= 0

never overflows. It does not underflow either while 2c is well inside the range of float32: for `c <= LARGEST_BOUND` the
largest term of a frame is at least 2^-93, so all terms that count at 24 bits are at least 2^-117 and normal numbers. No
pass for the maximum, no rescaling, and one exponential serves two softmaxes, over all tokens and over those of known
value: both have the reference `c`. In the gradient it serves both, too, since `exp(s - known_lse) = exp(s - lse)
exp(lse - known_lse)`, and that ratio is at most n 2^2c. Each lane sums its own columns; lanes are added after the loop.

**Colder temperatures** take the online softmax. With `m` the maximum so far and `z` the sum of `2^(y - m)` so far, a
block with maximum `m'` gives `M = max(m, m')`, `z <- z 2^(m - M) + sum 2^(y - M)`, `m <- M`: every exponent is <= 0 and
the largest term is exactly 1. Tokens of known value have a second `m` and `z`, because they may all lie far below the
others. The temperature decides on the device, the host never reads it.

`best` moves only to a strictly larger similarity, and within a block it is the least column: the first of equals.

**The row's own column, and targets that are ignored,** are in one frame of their row, and only the program of that
frame reads them. It sets them to -inf in memory and passes a barrier, so the loop over the similarities compares
nothing. The gradient computes all columns alike and then, after a barrier, writes these and the targets again, from
`positive`; no other program writes there.

A frame begins at any column. `ALIGN` (1, 2 or 4) divides every offset, so that many numbers are loaded at once.
Addresses are 64-bit; a frame of a chunk has fewer than 2^31 columns.
"""

from __future__ import annotations

from .triton_launch import INTERPRETED, constant, jit, kernel, libdevice, tl

LOG2E = constant(1.4426950408889634)
LN2 = constant(0.6931471805599453)
LARGEST_BOUND = constant(46.6)  # tau > 0.031
NOWHERE = constant(2**31 - 1)  # larger than every column
MATCHES = constant(16)  # of a row, visited at once: those of two rows fill a warp


@jit
def exponent(x, factor, reference):
    """`y` of the text above, rounded once wherever it is computed: `place_in_lane` looks for the same bits."""
    return tl.fma(x, factor, -reference)


@jit
def reference_of(c):
    return tl.where(c <= LARGEST_BOUND, c, 0.0)


@jit
def log_of(total, reference):
    """`log(total 2^reference)`; -inf for an empty sum."""
    return tl.where(total == 0.0, float("-inf"), (reference + tl.log2(total)) * LN2)


if INTERPRETED:  # on a CPU

    @jit
    def fast_log2(x):
        return tl.log2(x)
else:

    @jit
    def fast_log2(x):
        """One instruction instead of thirty. Its error, 4e-7 near 1, is less than a last digit of most `lse`."""
        return libdevice.fast_log2f(x)


@jit
def log_beside(peak, total, reference):
    """The same for a sum whose largest term is `2^peak`. Where that is the only one, the result is its similarity,
    rounded as `write_positives` rounds that of a match."""
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    rest = fast_log2(total * tl.exp2(-peak)) * LN2
    return tl.where(total == 0.0, float("-inf"), (peak + reference) * LN2 + rest)


@jit
def log_add(a, b):
    """`log(exp(a) + exp(b))`, of which both may be -inf."""
    largest = tl.maximum(a, b)
    sum_ = tl.exp(a - largest) + tl.exp(b - largest)
    return tl.where(largest == float("-inf"), a + b, largest + tl.log(sum_))  # a + b: -inf, or a NaN


@jit
def share(part, whole):
    """`exp(part - whole)`; 0 for an empty part."""
    return tl.where(part == float("-inf"), 0.0, tl.exp(part - whole))


@jit
def known_at(known, values, column, inside, v: tl.constexpr, VALUES: tl.constexpr):
    """1 where a value is known, else 0, and the v-th value, 0 where it is not."""
    is_known = tl.load(known + column, mask=inside, other=0.0)
    value = tl.load(values + column * VALUES + v, mask=inside, other=0.0)
    return is_known, value


@jit
def in_frame(column, size, mask):
    return mask & (column >= 0) & (column < size)


@jit
def frame_columns(frame_offsets, frame, first_column, columns, ALIGN: tl.constexpr):
    """The first column of a frame in the chunk, and how many it has there."""
    begin = (tl.load(frame_offsets + frame) - first_column).to(tl.int32)  # a sequence has fewer than 2^31 tokens
    end = (tl.load(frame_offsets + frame + 1) - first_column).to(tl.int32)
    begin = tl.minimum(tl.maximum(begin, 0), columns)
    end = tl.minimum(tl.maximum(end, 0), columns)
    return tl.multiple_of(begin, ALIGN), tl.multiple_of(end - begin, ALIGN)


@jit
def run_of(run_start, row, longest, frame):
    """The sorted position of each row's first match in a frame, and how many there are."""
    first = tl.load(run_start + row * longest + frame)
    return first, (tl.load(run_start + row * longest + frame + 1) - first).to(tl.int32)


@jit
def targets_at(first, count, slot, target, first_token, size):
    """Sorted positions of the matches at some slots of each row, their columns in the frame, and which lie there."""
    at = first[:, None] + slot[None, :]
    mine = slot[None, :] < count[:, None]
    column = tl.load(target + at, mask=mine, other=-1) - first_token
    return at, column, in_frame(column, size, mine)


@jit
def write_positives(line, norms, scale, reference, first, count, target, positive, first_token, size):
    """The similarity of each match to `positive`."""
    slot = tl.arange(0, MATCHES)
    for start in range(0, tl.max(count, 0), MATCHES):
        at, column, here = targets_at(first, count, start + slot, target, first_token, size)
        x = tl.load(line + column, mask=here, other=0.0)
        norm = tl.load(norms + column, mask=here, other=0.0)
        y = exponent(x, scale[:, None] * norm, reference)
        tl.store(positive + at, (y + reference) * LN2, mask=here)


@jit
def leave_out_targets(line, first, count, target, first_token, size):
    slot = tl.arange(0, MATCHES)
    for start in range(0, tl.max(count, 0), MATCHES):
        _, column, here = targets_at(first, count, start + slot, target, first_token, size)
        tl.store(line + column, float("-inf"), mask=here)


@jit
def of_lane(terms, ALIGN: tl.constexpr):
    """Sums of the `ALIGN` columns that a lane loads at once: [R, c] -> [R, c / ALIGN], in registers."""
    if ALIGN == 1:
        return terms
    return tl.sum(tl.reshape(terms, [terms.shape[0], terms.shape[1] // ALIGN, ALIGN]), 2)


@jit
def place_in_lane(line, norms, scale, size, c, peak, first, ALIGN: tl.constexpr):
    """Which of the `ALIGN` columns from `first` on has the exponent `peak`."""
    column = first[:, None] + tl.arange(0, ALIGN)[None, :]
    inside = column < size
    x = tl.load(line + column, mask=inside, other=0.0)
    y = exponent(x, scale[:, None] * tl.load(norms + column, mask=inside, other=0.0), c)
    return tl.min(tl.where(inside & (y == peak[:, None]), column, NOWHERE), 1)


@jit
def bounded_sums(
    line, norms, scale, size, c, values, known,
    VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`lse`, `known_lse`, expected values, peak and its offset in the frame, with the reference `c`."""
    offset = tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS // ALIGN], tl.float32)
    known_total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS // ALIGN], tl.float32)
    moment = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS // ALIGN], tl.float32)  # of a single value
    slot = tl.arange(0, PADDED_VALUES)
    moments = tl.zeros([BLOCK_ROWS, PADDED_VALUES], tl.float32)  # of several
    top = tl.full([BLOCK_ROWS, BLOCK_COLUMNS // ALIGN], float("-inf"), tl.float32)
    begin_of_top = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS // ALIGN], tl.int32)
    for start in range(0, size, BLOCK_COLUMNS):
        column = start + offset
        inside = column < size
        x = tl.load(line + column[None, :], mask=inside[None, :], other=0.0)
        norm = tl.load(norms + column, mask=inside, other=0.0)
        bias = tl.where(inside, c, float("inf"))
        y = exponent(x, scale[:, None] * norm[None, :], bias[None, :])
        e = tl.exp2(y)
        total += of_lane(e, ALIGN)
        for v in tl.static_range(VALUES):
            is_known, value = known_at(known, values, column, inside, v, VALUES)
            if v == 0:
                known_total += of_lane(e * is_known[None, :], ALIGN)
            if VALUES == 1:
                moment += of_lane(e * value[None, :], ALIGN)
            else:
                part = tl.sum(e * value[None, :], 1)
                moments += tl.where(slot[None, :] == v, part[:, None], 0.0)
        highest = tl.max(tl.reshape(y, [BLOCK_ROWS, BLOCK_COLUMNS // ALIGN, ALIGN]), 2)
        better = highest > top
        top = tl.where(better, highest, top)
        begin_of_top = tl.where(better, start, begin_of_top)
    peak = tl.max(top, 1)
    lane = begin_of_top + ALIGN * tl.arange(0, BLOCK_COLUMNS // ALIGN)[None, :]
    first = tl.min(tl.where(top == peak[:, None], lane, NOWHERE), 1)
    best = place_in_lane(line, norms, scale, size, c, peak, first, ALIGN)
    known_sum = tl.sum(known_total, 1)
    if VALUES == 1:
        moments = tl.sum(moment, 1)[:, None]
    mean = moments / tl.where(known_sum == 0.0, 1.0, known_sum)[:, None]
    return log_beside(peak, tl.sum(total, 1), c), log_beside(peak, known_sum, c), mean, (peak + c) * LN2, best


@jit
def online_step(y, maximum, total):
    """One block of the online softmax: the new maximum and sum, the block's terms, the factor of the old sums."""
    new_maximum = tl.maximum(maximum, tl.max(y, 1))
    reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    e = tl.exp2(y - reference[:, None])
    shrink = tl.exp2(maximum - reference)
    return new_maximum, total * shrink + tl.sum(e, 1), e, shrink


@jit
def online_sums(
    line, norms, scale, size, values, known,
    VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The same for any temperature."""
    offset = tl.arange(0, BLOCK_COLUMNS)
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    known_maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    known_total = tl.zeros([BLOCK_ROWS], tl.float32)
    slot = tl.arange(0, PADDED_VALUES)
    moments = tl.zeros([BLOCK_ROWS, PADDED_VALUES], tl.float32)
    best = tl.full([BLOCK_ROWS], NOWHERE, tl.int32)
    for start in range(0, size, BLOCK_COLUMNS):
        column = start + offset
        inside = column < size
        x = tl.load(line + column[None, :], mask=inside[None, :], other=0.0)
        norm = tl.load(norms + column, mask=inside, other=0.0)
        y = tl.where(inside[None, :], exponent(x, scale[:, None] * norm[None, :], 0.0), float("-inf"))
        top = tl.max(y, 1)
        first = tl.min(tl.where(y == top[:, None], column[None, :], NOWHERE), 1)
        best = tl.where(top > maximum, first, best)
        maximum, total, _, _ = online_step(y, maximum, total)
        for v in tl.static_range(VALUES):
            is_known, value = known_at(known, values, column, inside, v, VALUES)
            if v == 0:
                known_y = tl.where((is_known > 0.0)[None, :], y, float("-inf"))
                known_maximum, known_total, e, shrink = online_step(known_y, known_maximum, known_total)
                moments *= shrink[:, None]
            part = tl.sum(e * value[None, :], 1)
            moments += tl.where(slot[None, :] == v, part[:, None], 0.0)
    mean = moments / tl.where(known_total == 0.0, 1.0, known_total)[:, None]
    return log_of(total, maximum), log_of(known_total, known_maximum), mean, maximum * LN2, best


@kernel("similarity", "positive", "lse", "known_lse", "expected", "best", "peak", "negative_lse", direct=True)
def frame_statistics(
    similarity, pitch_g: tl.int64, pitch: tl.int64, row_scale, row_scale_g: tl.int64, token_scale,
    token_scale_g: tl.int64, temperature, row_token, first_token: tl.int64, frame_offsets, first_column: tl.int64,
    columns, values, known, run_start, longest, target, positive, positive_g: tl.int64,
    lse, known_lse, expected, best, peak, negative_lse, rows, frames,
    VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr, EVERY_FRAME: tl.constexpr, MERGED: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_ROWS` rows against one frame. Frames run fastest, so neighbours share cache lines.

    The last rows come first, since the product wrote them last. So the gradient, which begins with the first rows,
    finds these in the cache.

    `row_token` is None where a row's own column counts, `run_start` where there are no matches, `negative_lse` unless
    targets are ignored. `MERGED`: the results hold the statistics of earlier columns, and these are added.
    """
    frame = tl.program_id(0)
    group = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < rows
    row = tl.minimum(row, rows - 1).to(tl.int64)  # rows beyond the last repeat it
    begin, size = frame_columns(frame_offsets, frame, first_column, columns, ALIGN)
    first_token += begin
    if run_start is not None:
        positive += group * positive_g
        if negative_lse is not None or not EVERY_FRAME:
            first, count = run_of(run_start, row, longest, frame)
        if not EVERY_FRAME:  # no match, no column to read
            size = tl.multiple_of(tl.where(tl.max(count, 0) > 0, size, 0), ALIGN)

    c = LOG2E / tl.load(temperature)
    scale = tl.load(row_scale + group * row_scale_g + row) * c
    line = tl.multiple_of(similarity + group * pitch_g + begin + row[:, None] * pitch, [4 * ALIGN, 4 * ALIGN])
    norms = tl.multiple_of(token_scale + group * token_scale_g + begin, 4 * ALIGN)
    if VALUES > 0:
        values = tl.multiple_of(values + begin * VALUES, 4 * ALIGN)
        known = tl.multiple_of(known + begin, 4 * ALIGN)
    if row_token is not None:
        own = tl.load(row_token + row) - first_token
        tl.store(line + own[:, None], float("-inf"), mask=in_frame(own, size, row_mask)[:, None])
    if negative_lse is not None:
        write_positives(line, norms, scale, reference_of(c), first, count, target, positive, first_token, size)
        tl.debug_barrier()  # a row may have a target several times
        leave_out_targets(line, first, count, target, first_token, size)
    tl.debug_barrier()
    if c <= LARGEST_BOUND:
        all_, known_, mean, top, at = bounded_sums(
            line, norms, scale, size, c, values, known, VALUES, PADDED_VALUES, ALIGN, BLOCK_ROWS, BLOCK_COLUMNS
        )
    else:
        all_, known_, mean, top, at = online_sums(
            line, norms, scale, size, values, known, VALUES, PADDED_VALUES, BLOCK_ROWS, BLOCK_COLUMNS
        )
    if run_start is not None and negative_lse is None:
        first, count = run_of(run_start, row, longest, frame)  # only now: the loop has no registers for them
        write_positives(line, norms, scale, reference_of(c), first, count, target, positive, first_token, size)
    token = tl.where(top == float("-inf"), -1, first_token + at)
    negative = all_
    slot = tl.arange(0, PADDED_VALUES)
    value_mask = (slot < VALUES)[None, :]
    if negative_lse is not None:  # the targets, which are -inf in `similarity`
        before = tl.full([BLOCK_ROWS], -1, tl.int64)
        for k in range(tl.max(count, 0)):
            mine = k < count
            other = tl.load(target + first + k, mask=mine, other=-1)
            column = other - first_token
            new = in_frame(column, size, mine & (other != before))
            before = other
            s = tl.load(positive + first + k, mask=new, other=float("-inf"))
            all_ = log_add(all_, s)
            better = new & ((s > top) | ((s == top) & (other < token)))
            top = tl.where(better, s, top)
            token = tl.where(better, other, token)
            if VALUES > 0:
                is_known = tl.load(known + column, mask=new, other=0.0) > 0.0
                value_at = values + column[:, None] * VALUES + slot[None, :]
                value = tl.load(value_at, mask=value_mask & (new & is_known)[:, None], other=0.0)
                known_s = tl.where(is_known, s, float("-inf"))
                known_ = log_add(known_, known_s)
                mean += (value - mean) * share(known_s, known_)[:, None]
    if run_start is not None:
        matched = count > 0
        known_ = tl.where(matched, known_, float("-inf"))
        mean = tl.where(matched[:, None], mean, 0.0)
        if not EVERY_FRAME:
            all_ = tl.where(matched, all_, float("-inf"))
            negative = tl.where(matched, negative, float("-inf"))
            top = tl.where(matched, top, float("-inf"))
            token = tl.where(matched, token, -1)

    cell = (group * rows + row) * frames + frame
    value_at = expected + cell[:, None] * VALUES + slot[None, :]
    value_mask = value_mask & row_mask[:, None]
    if MERGED:
        all_ = log_add(tl.load(lse + cell), all_)
        if negative_lse is not None:
            negative = log_add(tl.load(negative_lse + cell), negative)
        earlier_known = tl.load(known_lse + cell)
        both_known = log_add(earlier_known, known_)
        if VALUES > 0:
            earlier_mean = tl.load(value_at, mask=value_mask, other=0.0)
            mean = earlier_mean * share(earlier_known, both_known)[:, None] + mean * share(known_, both_known)[:, None]
        known_ = both_known
        earlier_top = tl.load(peak + cell)
        later = top > earlier_top
        token = tl.where(later, token, tl.load(best + cell))
        top = tl.where(later, top, earlier_top)
    tl.store(lse + cell, all_, mask=row_mask)
    tl.store(known_lse + cell, known_, mask=row_mask)
    tl.store(best + cell, token, mask=row_mask)
    tl.store(peak + cell, top, mask=row_mask)
    if negative_lse is not None:
        tl.store(negative_lse + cell, negative, mask=row_mask)
    if VALUES > 0:
        tl.store(value_at, mean, mask=value_mask)

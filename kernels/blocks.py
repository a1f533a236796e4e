"""How the similarity matrix of a sequence is cut into blocks that fit a workspace.

    layers   that are computed together
    rows     of a gradient product: `X` has this many rows
    part     rows of a similarity product: a part of `rows`, so that float32 similarities stay small while `X` collects
    columns  tokens of a product: all of the sequence, or less where too few rows would fit

A gradient product with few rows is slow: it reads and writes the float32 accumulator of the tokens once for every
block, which costs as much as the product itself at about 900 rows. So rows are as many as fit. Where few whole rows
fit, columns are cut, too. Every similarity is then computed twice, once for the statistics of its row and once for its
gradient: four products instead of three, but in blocks that are about square, so that neither accumulator is read
often.

On a GPU a product runs in waves: its result is cut into tiles of 128 x 256, and as many tiles as there are
multiprocessors run at once. Rows are a multiple of 128, and among the sizes that fit the one with the least total time
is taken. `_device_time` counts waves, launches, and the traffic of accumulators and similarities; `_host_time` counts
what the host needs to start all that, and the longer of the two decides. The unit of time is one wave of a product with
an inner dimension of 1: 2 * 128 * 256 operations on each multiprocessor, 11 nanoseconds. `benchmarks/roofline.py`
predicts what the choice costs.

On a CPU layers are computed one by one, and a similarity product has all rows of its block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

TILE_ROWS, TILE_COLUMNS = 128, 256  # of the result of a product, for each multiprocessor
# Bytes that memory moves in one unit of time, for each multiprocessor: 4.3 TB/s against 790 TFLOP/s (H200), 3.0 against
# 750 (H100); the mean of both.
BYTES_PER_UNIT = 300
# Time without work of the device before the kernels of a part (one product, four row kernels) and of a block.
PART_UNITS, BLOCK_UNITS = 1500, 1500
# Time of the host to start them: about 220 and 240 microseconds on the machine of an H100.
HOST_PART_UNITS, HOST_BLOCK_UNITS = 20000, 22000
# Both row kernels of a part: a program reads rows of a frame, 128 columns at a time, and waits for memory each time;
# 20 programs of a multiprocessor wait together. Set for programs of 4 rows; those of `rows_triton` have 2.
WAIT_UNITS, PROGRAM_ROWS, PROGRAM_COLUMNS, PROGRAMS_AT_ONCE = 100, 4, 128, 20
CACHED_BYTES = 32 << 20  # similarities of a part that stay in the second-level cache (50 MB on an H100)


@dataclass(frozen=True)
class Blocks:
    layers: int
    rows: int
    part: int
    columns: int


@dataclass(frozen=True)
class Sizes:
    """What the blocks of a sequence depend on."""

    layers: int
    rows: int  # A
    tokens: int  # n
    width: int  # D
    element: int  # bytes of a number in the products; 4: `X` replaces the similarities in place
    backward: bool
    multiprocessors: int  # 0: a CPU
    frames: int = 1  # P


def blocks_for(sizes: Sizes, workspace: int) -> Blocks:
    """The blocks of a sequence in a workspace of so many bytes."""
    return (_blocks_on_gpu if sizes.multiprocessors else _blocks_on_cpu)(sizes, workspace)


def bytes_of(sizes: Sizes, layers: int, rows: int, part: int, columns: int) -> int:
    """Memory of a block: anchors, similarities, `X` and row gradients."""
    similarity, anchors = 4 * part * columns, sizes.element * rows * sizes.width
    if not sizes.backward:
        return layers * (anchors + similarity)
    row_gradient = 4 * rows * sizes.width
    if sizes.element == 4:
        return layers * (anchors + similarity + row_gradient)
    x = sizes.element * rows * columns
    if columns == sizes.tokens:  # row gradients take the place of the similarities, which are no longer needed
        return layers * (anchors + x + max(similarity, row_gradient))
    return layers * (anchors + x + similarity + row_gradient)


@lru_cache(maxsize=256)
def _blocks_on_cpu(sizes: Sizes, workspace: int) -> Blocks:
    few_rows = 64
    fitting = workspace // max(1, bytes_of(sizes, 1, 1, 1, sizes.tokens))
    if fitting < min(few_rows, sizes.rows):
        return _square_blocks(sizes, workspace, multiple=1)
    rows = _equal(sizes.rows, max(1, fitting))
    return Blocks(1, rows, rows, sizes.tokens)


@lru_cache(maxsize=256)
def _blocks_on_gpu(sizes: Sizes, workspace: int) -> Blocks:
    in_place = sizes.element == 4 or not sizes.backward
    candidates = [_square_blocks(sizes, workspace, multiple=TILE_ROWS)]
    for rows in _multiples(sizes.rows):
        for part in [rows] if in_place else _multiples(rows):
            if bytes_of(sizes, 1, rows, part, sizes.tokens) <= workspace:
                candidates.append(Blocks(1, rows, part, sizes.tokens))
    best = min(candidates, key=lambda blocks: _time(sizes, blocks))
    if best.rows < sizes.rows or best.columns < sizes.tokens:
        return best
    together = min(sizes.layers, workspace // max(1, bytes_of(sizes, 1, best.rows, best.rows, sizes.tokens)))
    return Blocks(together, best.rows, best.rows, best.columns) if together > 1 else best


def _time(sizes: Sizes, blocks: Blocks) -> float:
    """Time of one layer of a sequence, whichever of device and host takes longer."""
    return max(_device_time(sizes, blocks), _host_time(sizes, blocks))


def _device_time(sizes: Sizes, blocks: Blocks) -> float:
    """Time of all products, of the pauses before them, and of the memory that they move."""
    total, moved = 0.0, 0
    panels = _pieces(sizes.tokens, blocks.columns)
    visits = 2 if sizes.backward and blocks.columns < sizes.tokens else 1
    for row_blocks, rows in _pieces(sizes.rows, blocks.rows):
        for count, columns in panels:
            for parts, part in _pieces(rows, blocks.part):
                repeated = row_blocks * count * visits * parts
                total += repeated * (PART_UNITS + _waves(sizes, part, columns) * sizes.width)
                total += row_blocks * count * parts * _row_kernels(sizes, part, columns)
                if 4 * part * columns > CACHED_BYTES:
                    moved += repeated * 8 * part * columns
            if sizes.backward:
                total += row_blocks * count * (BLOCK_UNITS + _waves(sizes, rows, sizes.width) * columns)
                total += row_blocks * count * _waves(sizes, columns, sizes.width) * rows
    if sizes.backward:  # each accumulator is read and written again
        moved += _up(sizes.rows, blocks.rows) * 8 * sizes.tokens * sizes.width
        moved += _up(sizes.tokens, blocks.columns) * 8 * sizes.rows * sizes.width
    return total + moved / (BYTES_PER_UNIT * sizes.multiprocessors)


def _row_kernels(sizes: Sizes, part: int, columns: int) -> float:
    """What the row kernels of a part wait for memory: long if its rows and frames are few and its columns many."""
    frame = _up(sizes.tokens, sizes.frames)
    programs = _up(part, PROGRAM_ROWS) * _up(columns, frame)
    waves = _up(programs, PROGRAMS_AT_ONCE * sizes.multiprocessors)
    return WAIT_UNITS * waves * _up(min(columns, frame), PROGRAM_COLUMNS)


def _host_time(sizes: Sizes, blocks: Blocks) -> float:
    row_blocks, panels = _up(sizes.rows, blocks.rows), _up(sizes.tokens, blocks.columns)
    visits = 2 if sizes.backward and panels > 1 else 1
    parts = _up(min(blocks.rows, sizes.rows), blocks.part)
    return row_blocks * panels * (HOST_BLOCK_UNITS + visits * parts * HOST_PART_UNITS)


def _waves(sizes: Sizes, rows: int, columns: int) -> int:
    return _up(_up(rows, TILE_ROWS) * _up(columns, TILE_COLUMNS), sizes.multiprocessors)


def _square_blocks(sizes: Sizes, workspace: int, multiple: int) -> Blocks:
    """As many columns as rows. On a GPU a part has half of the rows, where `X` has memory of its own.

    `rows * rows * (element + similarity) + rows * width * (element + 4)` bytes, `similarity` bytes of a part for each
    number of `X`.
    """
    parts = 2 if sizes.multiprocessors and sizes.element < 4 else 1
    similarity = 4 // parts if sizes.element < 4 else 0
    linear, square = sizes.width * (sizes.element + 4), sizes.element + similarity
    rows = (isqrt(linear * linear + 4 * square * workspace) - linear) // (2 * square)
    rows = min(sizes.rows, max(1, rows // multiple * multiple or rows))
    part = max(1, rows // parts // multiple * multiple or rows // parts)
    columns = (workspace - rows * linear) // max(1, rows * sizes.element + (4 * part if similarity else 0))
    columns = min(sizes.tokens, max(1, columns // multiple * multiple or columns))
    return Blocks(1, rows, part, columns)


def _multiples(size: int) -> list[int]:
    """Multiples of a tile's rows below `size`, at most 64 of them, and `size` itself."""
    step = TILE_ROWS * _up(size, 64 * TILE_ROWS)
    return [*range(step, size, step), size]


def _equal(size: int, most: int) -> int:
    """The size of as few equal pieces as possible, each of at most `most`."""
    return max(1, _up(size, max(1, _up(size, most))))


def _up(size: int, block: int) -> int:
    """`size / block`, rounded up."""
    return -(-size // block)


def _pieces(size: int, piece: int) -> list[tuple[int, int]]:
    """The (number, size) of pieces: whole ones, and what is left."""
    whole, rest = divmod(size, piece)
    return [(number, length) for number, length in ((whole, piece), (1, rest)) if number and length]

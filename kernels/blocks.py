"""How the similarity matrix of a sequence is cut into blocks that fit a workspace.

    layers   that are computed together
    rows     of a gradient product: `X` has this many rows
    part     rows of a similarity product: a part of `rows`, so that float32 similarities stay small while `X` collects
    columns  tokens of a product: all of the sequence, or less where too few rows would fit
    panel    tokens whose gradient is computed at a time, where one block has all rows and columns; else 0
    folded   whether `X` is folded (`fold_kernels`): panels are then of the tokens that are no rows

One block for all rows is best. The gradient of the tokens is then complete at once: it needs no accumulator, but a
panel of float32 numbers, which is projected before the next one takes its place. And what is between two anchors can be
added before the products: with half of the tokens anchors, that saves a quarter of both gradient products. It takes
memory for the columns that are no rows, and passes over `X`, which are worth it unless the width is small.

On a GPU such a block may be larger than the workspace, by as much as the accumulator of all tokens that it replaces:
blocks that accumulate have that beside their workspace, so the peak of memory is no higher. These, and blocks that are
folded, have `X` in the memory of the gradient itself, if it fits there (`in_gradient`).

Where `X` of all rows does not fit, each block adds to an accumulator of all tokens. A gradient product with few rows is
slow then: it reads and writes the accumulator once for every block, which costs as much as the product itself at about
900 rows. So rows are as many as fit. Where few whole rows fit, columns are cut, too. Every similarity is then computed
twice, once for the statistics of its row and once for its gradient: four products instead of three, but in blocks that
are about square, so that neither accumulator is read often.

On a GPU a product runs in waves: its result is cut into tiles, and as many tiles as there are multiprocessors run at
once. Rows and panels are multiples of 128, and among the sizes that fit the one with the least total time is taken.
`_device_time` adds products, launches, and the traffic of similarities between row kernels; `_host_time` counts what
the host needs to start all that, and the longer of the two decides. The unit of time is a tile of 128 x 256 of a
product with an inner dimension of 1: 2 * 128 * 256 operations on each multiprocessor, 11 nanoseconds.
`benchmarks/roofline.py` predicts what the choice costs.

On a CPU layers are computed one by one, and a similarity product has all rows of its block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, inf, isqrt
from typing import NamedTuple

from .rows_triton import tile_for

TILE_ROWS = 128
# Tiles of a product's result, one for each multiprocessor at a time; the fastest is taken. Of a last, incomplete wave
# the share `WAVE_LOSS` is lost; edges take as long as `TILE_EDGE` more rows or columns, the start of a tile as long as
# an inner dimension of `TILE_START`; computing and moving overlap in part, as a norm with the exponent `OVERLAP`.
# Operands and results move at the share `PRODUCT_BANDWIDTH` of the speed of a copy. Where tiles are few, the library
# divides the inner dimension, into at least `LEAST_INNER` each. `benchmarks/roofline.py` fits all this.
TILES = ((128, 256), (256, 128), (192, 192), (192, 128), (128, 160), (128, 128))
WAVE_LOSS, TILE_EDGE, TILE_START, OVERLAP, PRODUCT_BANDWIDTH = 0.23, 2.7, 91, 1.6, 0.7
DIVISIONS, LEAST_INNER = (1, 2, 3, 4, 6, 8), 256
# Bytes that memory moves in one unit of time, for each multiprocessor: 4.3 TB/s against 790 TFLOP/s (H200), 3.0 against
# 750 (H100); the mean of both.
BYTES_PER_UNIT = 300
# Time without work of the device before the kernels of a part (one product, three row kernels), of a block (anchors and
# the gradient of the rows), of a panel (the gradient of the tokens, added or projected) and of folding.
PART_UNITS, BLOCK_UNITS, PANEL_UNITS, FOLD_UNITS = 1500, 900, 600, 900
# Time of the host to start them: about 220, 150 and 90 microseconds on the machine of an H100. That of an H200 took two
# thirds of it, and a third of that for layers that repeat a recording; slower hosts than both are common.
HOST_PART_UNITS, HOST_BLOCK_UNITS, HOST_PANEL_UNITS = 20000, 14000, 8000
# How long both row kernels of a part wait for memory at a time; so many warps of a multiprocessor wait together.
WAIT_UNITS, WARPS_AT_ONCE = 100, 24
MOST_BLOCKS, MOST_PARTS = 48, 16  # rows are cut into at most so many
# Of a part: along its second axis a grid has 65,535 programs, of two rows.
MOST_ROWS = 65_535 // (TILE_ROWS // 2) * TILE_ROWS
CACHED_BYTES = 32 << 20  # similarities of a part that stay in the second-level cache (50 MB on an H100)
PITCH = 64  # numbers; columns without those of rows, of which there is any number, begin each row at a multiple of it
LEAST_CPU_PANEL = 256  # tokens; products of fewer are slower than the memory that they save


@dataclass(frozen=True)
class Blocks:
    layers: int
    rows: int
    part: int
    columns: int
    panel: int = 0  # 0: blocks add to an accumulator
    folded: bool = False


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
    wide: bool = False  # gradients are float32: products write them where they belong
    foldable: bool = False  # rows are tokens of the sequence, and gradients of both are added; folding is worth a try

    @property
    def left(self) -> int:
        """Tokens that are no rows."""
        return self.tokens - self.rows

    @property
    def accumulator(self) -> int:
        """Bytes of the tokens' gradient in float32, which blocks that accumulate have beside the workspace; 0: none."""
        accumulates = self.backward and self.foldable and self.multiprocessors > 0 and not self.wide
        return 4 * self.tokens * self.width if accumulates else 0

    @property
    def rest_pitch(self) -> int:
        """Numbers from one row of the columns that are no rows to the next; libraries are fast at multiples of this."""
        return _up(self.left, PITCH) * PITCH


class Scratch(NamedTuple):
    """Float32 memory of a block: where each part of it begins, and its size, in numbers.

    Similarities come first. Row gradients and the panel take their place where `X` does not, and all columns are in it.
    Where `X` is folded, the panel takes that of the row gradients, which are projected before.
    """

    row_gradient: int
    panel: int
    size: int

    @staticmethod
    def of(sizes: Sizes, blocks: Blocks) -> Scratch:
        similarity = blocks.layers * blocks.part * blocks.columns
        if not sizes.backward:
            return Scratch(similarity, similarity, similarity)
        shared = sizes.element < 4 and blocks.columns == sizes.tokens
        row_gradient = 0 if shared else similarity
        end = row_gradient + blocks.layers * blocks.rows * sizes.width
        panel = row_gradient if blocks.folded else end
        in_panel = 0 if sizes.wide and not blocks.folded else blocks.layers * blocks.panel * sizes.width
        return Scratch(row_gradient, panel, max(similarity, end, panel + in_panel))


def blocks_for(sizes: Sizes, workspace: int) -> Blocks:
    """The blocks of a sequence in a workspace of so many bytes."""
    return (_blocks_on_gpu if sizes.multiprocessors else _blocks_on_cpu)(sizes, workspace)


def bytes_of(sizes: Sizes, blocks: Blocks) -> int:
    """Memory of a block: anchors, `X`, similarities, row gradients, the panel, and the columns that are no rows."""
    numbers = blocks.rows * sizes.width
    if sizes.backward and sizes.element < 4 and not in_gradient(sizes, blocks):
        numbers += blocks.rows * blocks.columns
    if blocks.folded:
        numbers += blocks.rows * sizes.rest_pitch
    return blocks.layers * sizes.element * numbers + 4 * Scratch.of(sizes, blocks).size


def in_gradient(sizes: Sizes, blocks: Blocks) -> bool:
    """Whether `X` has the memory of the gradient, of the same type, which nothing is written to while `X` is needed.

    Blocks that accumulate do so elsewhere until the end. A folded `X` is read for the last time by the product that
    gives the gradient of the rows; the other columns have memory of their own.
    """
    written_later = sizes.accumulator > 0 and sizes.element < 4 and (blocks.folded or blocks.panel == 0)
    return written_later and blocks.rows * blocks.columns <= sizes.tokens * sizes.width


@lru_cache(maxsize=256)
def _blocks_on_cpu(sizes: Sizes, workspace: int) -> Blocks:
    few_rows = 64
    fitting = workspace // max(1, bytes_of(sizes, Blocks(1, 1, 1, sizes.tokens)))
    if fitting < min(few_rows, sizes.rows):
        return _square_blocks(sizes, workspace, multiple=1)
    rows = _equal(sizes.rows, max(1, fitting))
    blocks = Blocks(1, rows, rows, sizes.tokens)
    for whole in _foldings(sizes, blocks) if rows == sizes.rows else []:
        most, tokens = _largest_panel(sizes, whole, workspace), _panel_tokens(sizes, whole)
        if most >= min(LEAST_CPU_PANEL, tokens):
            return replace(whole, panel=_equal(tokens, most))
    return blocks


@lru_cache(maxsize=256)
def _blocks_on_gpu(sizes: Sizes, workspace: int) -> Blocks:
    whole = list(_whole_blocks(sizes, workspace + sizes.accumulator))
    candidates = [*whole]
    for rows in _shares(sizes.rows, MOST_BLOCKS):
        if rows == sizes.rows and whole:  # without an accumulator
            continue
        for part in _parts(sizes, rows):
            blocks = Blocks(1, rows, part, sizes.tokens)
            if bytes_of(sizes, blocks) <= workspace:
                candidates.append(blocks)
    square = _square_blocks(sizes, workspace, multiple=TILE_ROWS)
    candidates += _cut_blocks(sizes, workspace, square)  # last: among equals, whole columns are taken
    return min(candidates or [square], key=lambda blocks: _time(sizes, blocks))


def _cut_blocks(sizes: Sizes, workspace: int, square: Blocks) -> Iterator[Blocks]:
    """Blocks that are more or less square, with equal parts and equal cuts of the columns."""
    for percent in (60, 70, 80, 90, 100, 120, 160, 200):
        rows = min(sizes.rows, MOST_ROWS, max(1, square.rows * percent // 100 // TILE_ROWS) * TILE_ROWS)
        for part in _parts(sizes, rows, most=4):
            without = bytes_of(sizes, Blocks(1, rows, part, 0))
            column = bytes_of(sizes, Blocks(1, rows, part, 1)) - without
            most = max(0, workspace - without) // max(1, column)
            blocks = Blocks(1, rows, part, _up(_equal(sizes.tokens, most), TILE_ROWS) * TILE_ROWS)
            if 0 < blocks.columns < sizes.tokens and bytes_of(sizes, blocks) <= workspace:
                yield blocks


def _whole_blocks(sizes: Sizes, workspace: int) -> Iterator[Blocks]:
    """Blocks of all rows and columns in so many bytes, with panels where gradients are computed."""
    for layers in range(1, sizes.layers + 1):
        for part in _parts(sizes, sizes.rows) if layers == 1 or sizes.rows > MOST_ROWS else [sizes.rows]:
            blocks = Blocks(layers, sizes.rows, part, sizes.tokens)
            if bytes_of(sizes, blocks) > workspace:
                continue
            if not sizes.backward:
                yield blocks
            for whole in _foldings(sizes, blocks):
                for panel in _panels(sizes, whole, workspace):
                    yield replace(whole, panel=panel)


def _foldings(sizes: Sizes, blocks: Blocks) -> list[Blocks]:
    """A block of all rows, folded where that is possible, and as it is, both with the smallest panel."""
    whole = replace(blocks, panel=1)
    return [replace(whole, folded=True), whole] if sizes.foldable else [whole]


def _panel_tokens(sizes: Sizes, blocks: Blocks) -> int:
    """The tokens whose gradient is computed in panels; at least 1, so that a block of all tokens counts as one, too."""
    return max(1, sizes.left) if blocks.folded else sizes.tokens


def _panels(sizes: Sizes, blocks: Blocks, workspace: int) -> Iterator[int]:
    """Some sizes of panels: as few as possible, and slightly more, which may fill waves better."""
    most, tokens = _largest_panel(sizes, blocks, workspace), _panel_tokens(sizes, blocks)
    if most >= tokens:
        yield tokens
    elif most >= TILE_ROWS:
        fewest = _up(tokens, most // TILE_ROWS * TILE_ROWS)
        for count in range(fewest, fewest + 3):
            yield _up(_up(tokens, count), TILE_ROWS) * TILE_ROWS


def _largest_panel(sizes: Sizes, blocks: Blocks, workspace: int) -> int:
    """The most tokens of a panel that fits beside the block; 0 where that has not all rows, or does not fit itself."""
    needed, tokens = bytes_of(sizes, blocks), _panel_tokens(sizes, blocks)
    if not sizes.backward or blocks.rows < sizes.rows or needed > workspace:
        return 0
    if sizes.wide and not blocks.folded:
        return tokens
    scratch = Scratch.of(sizes, blocks)
    free = workspace - needed + 4 * (scratch.size - scratch.panel)
    return min(tokens, free // (4 * blocks.layers * sizes.width))


def _time(sizes: Sizes, blocks: Blocks) -> float:
    """Time of all layers of a sequence, whichever of device and host takes longer."""
    groups = _pieces(sizes.layers, blocks.layers)
    device = sum(count * _device_time(sizes, blocks, layers) for count, layers in groups)
    return max(device, sum(count for count, _ in groups) * _host_time(sizes, blocks))


def _device_time(sizes: Sizes, blocks: Blocks, layers: int) -> float:
    """Time of the products of some layers, of the pauses before them, and of what else depends on the blocks."""
    total, moved, width = 0.0, 0, sizes.width
    cuts = _pieces(sizes.tokens, blocks.columns)
    visits = 2 if sizes.backward and blocks.columns < sizes.tokens else 1
    repeatedly = blocks.rows < sizes.rows or blocks.columns < sizes.tokens  # products add to what is there
    for row_blocks, rows in _pieces(sizes.rows, blocks.rows):
        for count, columns in cuts:
            times = row_blocks * count
            for parts, part in _pieces(rows, blocks.part):
                product = _product(sizes, layers, part, columns, width, 1)
                total += times * parts * (visits * (PART_UNITS + product) + _row_kernels(sizes, layers, part, columns))
                if 4 * layers * part * columns > CACHED_BYTES:  # each of the two row kernels reads it from memory
                    moved += times * parts * 8 * layers * part * columns
            if not sizes.backward:
                continue
            total += times * (BLOCK_UNITS + _product(sizes, layers, rows, width, columns, 2 if len(cuts) > 1 else 1))
            of_panels = sizes.left if blocks.folded else columns
            for panels, tokens in _pieces(of_panels, blocks.panel or columns):
                product = _product(sizes, layers, tokens, width, rows, 2 if repeatedly else 1)
                total += times * panels * (PANEL_UNITS + product)
            if blocks.folded:  # `X` is read and written once; then the anchors' gradient is projected
                total += FOLD_UNITS
                moved += 2 * layers * sizes.element * rows * columns
    if sizes.backward:  # row gradients are added to the accumulator, except those of the last block
        moved += 8 * layers * max(0, sizes.rows - blocks.rows) * width
    return total + moved / (BYTES_PER_UNIT * sizes.multiprocessors)


def _product(sizes: Sizes, layers: int, m: int, n: int, k: int, results: int) -> float:
    """Time of products [m, k] x [k, n], whose float32 results are moved so many times; see `roofline_model`."""
    moved, fastest = layers * (sizes.element * (m + n) * k + 4 * results * m * n), inf
    enough = layers * m * n >= 128 * 256 * sizes.multiprocessors  # tiles for a wave
    for parts in DIVISIONS:
        if parts > 1 and (enough or k < parts * LEAST_INNER):
            break
        partial = 8 * layers * parts * m * n if parts > 1 else 0  # float32, written and read
        moving = (moved + partial) / (PRODUCT_BANDWIDTH * BYTES_PER_UNIT * sizes.multiprocessors)
        computing = _computing(sizes.multiprocessors, layers * parts, m, n, k / parts)
        fastest = min(fastest, (computing**OVERLAP + moving**OVERLAP) ** (1 / OVERLAP))
    return fastest


@lru_cache(maxsize=4096)  # many candidates have the same products
def _computing(multiprocessors: int, products: int, m: int, n: int, k: float) -> float:
    fastest = inf
    for rows, columns in TILES:
        exact = products * _up(m, rows) * _up(n, columns) / multiprocessors
        waves = max(1.0, WAVE_LOSS * ceil(exact) + (1 - WAVE_LOSS) * exact)
        fastest = min(fastest, waves * (rows + TILE_EDGE) * (columns + TILE_EDGE) * (k + TILE_START))
    return fastest / (128 * 256)


def _row_kernels(sizes: Sizes, layers: int, part: int, columns: int) -> float:
    """What the row kernels of a part wait for memory: long if its rows and frames are few and its columns many.

    A program waits at its start, also where its frame has none of the columns, and in each pass over the columns.
    """
    frame = _up(sizes.tokens, sizes.frames)
    tile = tile_for(layers * part * sizes.frames, columns // sizes.frames)
    warps = _up(layers * part, tile.rows) * tile.warps  # for a frame
    starts, visits = (
        _up(warps * frames, WARPS_AT_ONCE * sizes.multiprocessors) for frames in (sizes.frames, _up(columns, frame))
    )
    return WAIT_UNITS * (starts + visits * _up(min(columns, frame), tile.columns))


def _host_time(sizes: Sizes, blocks: Blocks) -> float:
    """Time of the host for one group of layers."""
    row_blocks, cuts = _up(sizes.rows, blocks.rows), _up(sizes.tokens, blocks.columns)
    visits = 2 if sizes.backward and cuts > 1 else 1
    parts = _up(min(blocks.rows, sizes.rows), blocks.part)
    units = HOST_BLOCK_UNITS + visits * parts * HOST_PART_UNITS
    if sizes.backward:
        of_panels = sizes.left if blocks.folded else blocks.columns
        units += (_up(of_panels, blocks.panel or blocks.columns) + blocks.folded) * HOST_PANEL_UNITS
    return row_blocks * cuts * units


def _parts(sizes: Sizes, rows: int, most: int = MOST_PARTS) -> list[int]:
    """Sizes of a part of so many rows: all of them where `X` replaces the similarities, or there is no `X`."""
    parts = [rows] if sizes.element == 4 or not sizes.backward else _shares(rows, most)
    return [part for part in parts if part <= MOST_ROWS]


def _square_blocks(sizes: Sizes, workspace: int, multiple: int) -> Blocks:
    """As many columns as rows. On a GPU a part has half of the rows, where `X` does not replace similarities.

    `rows * rows * (element + similarity) + rows * width * (element + 4)` bytes, `similarity` bytes of a part for each
    number of `X`.
    """
    parts = 2 if sizes.multiprocessors and sizes.element < 4 else 1
    similarity = 4 // parts if sizes.element < 4 else 0
    linear, square = sizes.width * (sizes.element + 4), sizes.element + similarity
    rows = (isqrt(linear * linear + 4 * square * workspace) - linear) // (2 * square)
    rows = min(sizes.rows, MOST_ROWS, max(1, rows // multiple * multiple or rows))
    part = max(1, rows // parts // multiple * multiple or rows // parts)
    columns = (workspace - rows * linear) // max(1, rows * sizes.element + (4 * part if similarity else 0))
    columns = min(sizes.tokens, max(1, columns // multiple * multiple or columns))
    return Blocks(1, rows, part, columns)


def _shares(size: int, most: int) -> list[int]:
    """Equal shares of `size`, up to `most` of them, in multiples of a tile's rows."""
    shares = (_up(_up(size, count), TILE_ROWS) * TILE_ROWS for count in range(2, most + 1))
    return sorted({size, *(share for share in shares if share < size)})


def _equal(size: int, most: int) -> int:
    """The size of as few equal pieces as possible, each of at most `most`."""
    return max(1, _up(size, max(1, _up(size, max(1, most)))))


def _up(size: int, block: int) -> int:
    """`size / block`, rounded up."""
    return -(-size // block)


def _pieces(size: int, piece: int) -> list[tuple[int, int]]:
    """The (number, size) of pieces: whole ones, and what is left."""
    whole, rest = divmod(size, piece)
    return [(number, length) for number, length in ((whole, piece), (1, rest)) if number and length]

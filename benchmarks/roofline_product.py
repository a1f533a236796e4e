"""The time of `product_statistics`: a matrix product with the row pass in its epilogue, and no result in memory.

A program multiplies a block of its columns, then adds the tile to the statistics of its rows, then goes on to the next
block. What each program has to do is read from the tables that the launch gets. What one block costs is

    products    the width of the embeddings, at `EFFICIENCY` of the rate that the library's kernels reach
    issuing     the instructions beside it: of the block, of each part of a frame in it, of each piece of its columns
    waiting     for loads whose results are needed at once, `WAIT` each

Where one program runs on a multiprocessor, its warps do all this in turn and nothing overlaps. Where two do, one adds
while the other multiplies. Programs start in order, each where one has ended, so the last ones may leave
multiprocessors idle. Each wave of programs reads its rows and columns from memory.

`EFFICIENCY` and `WAIT` were chosen so that calls take about as long as on the H100 of
`results/h100-2026-11-26` (`profile.json`): 44, 2.7, 5.6, 67 and 13 ms for W1, W2, W3, W5 and W4, measured 45, 2.7, 5.1,
64 and 17.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from roofline_model import CACHE_SHARE, ISSUED, Constants, Device, together
from roofline_sass import ProductCode, Way
from roofline_trace import Launch

# Rate of the loop over the width, relative to the library: loads by cp.async, no TMA, no warps that only load.
EFFICIENCY = 0.85
WAIT = 170e-9  # seconds until a load is there


@dataclass(frozen=True)
class Tables:
    """What the programs of a launch do: the tables of `product_statistics.Plan`, as numbers of the host."""

    programs: np.ndarray  # [., 4]: first row, end row, first block, end block
    blocks: np.ndarray  # [., 4]: first token, end token, first part, end part
    parts: np.ndarray  # [., 4]: first token, end token, frame, place

    def counts(self, pieces: int, columns: int) -> np.ndarray:
        """Of every program, [., 4]: blocks with tokens, parts in them, pieces of parts, ends of parts."""
        size = columns // pieces
        of_block = []
        for start, stop, first, last in self.blocks.tolist():
            begin, end = self.parts[first:last, 0], self.parts[first:last, 1]
            low, high = np.maximum(begin, start), np.minimum(end, stop)
            touched = np.where(high > low, -(-(high - start) // size) - (low - start) // size, 0)
            of_block.append((stop > start, last - first, touched.sum(), (end <= stop).sum()))
        sums = np.concatenate([np.zeros((1, 4)), np.cumsum(of_block, axis=0)])
        return sums[self.programs[:, 3]] - sums[self.programs[:, 2]]


def tables_of(work: Launch) -> Tables:
    named = work.named_arguments
    return Tables(*(work.host_values(named[name]).numpy() for name in ("programs", "blocks", "parts")))


def flops(work: Launch) -> int:
    """Of the products that the loss needs; incomplete blocks cost more."""
    named = work.named_arguments
    layers, _, width = named["keys"].shape
    tables = tables_of(work)
    rows = tables.programs[:, 1] - tables.programs[:, 0]
    tokens = tables.blocks[tables.programs[:, 3] - 1, 1] - tables.blocks[tables.programs[:, 2], 0]
    return 2 * layers * width * int((rows * tokens).sum())


def product_statistics_time(
    constants: Constants, device: Device, work: Launch, code: ProductCode, correction: float
) -> float:
    """Seconds of one launch. `correction`: how much longer the library's products took than the model says."""
    tables, named = tables_of(work), work.named_arguments
    layers, _, width = named["keys"].shape
    product, tile, step = constants.product, work.tile, work.constants["BLOCK_WIDTH"]
    rate = product.teraflops * 1e12 / device.multiprocessors / (1 + product.edge * (1 / tile.rows + 1 / tile.columns))
    passes = math.ceil(width / step)
    multiplying = 2 * tile.rows * tile.columns * (passes * step + product.start) / (rate * EFFICIENCY) * correction

    seconds = []
    for blocks, parts, pieces, ends in tables.counts(work.constants["PIECES"], tile.columns).tolist():
        way = _total(
            ((1, code.program), (blocks, code.block), (parts, code.part), (pieces, code.piece), (ends, code.end))
        )
        loop = blocks * passes * code.width.instructions
        seconds.append(_program_time(constants, code, blocks * multiplying, way, loop))
    busy = _last_end(seconds * layers, device.multiprocessors * code.resident)
    moving = _bytes(tables, named, device, code.resident) / (device.bandwidth * product.bandwidth)
    return together(product.norm, busy, moving) + product.launch * 1e-6


def _total(counted: tuple[tuple[float, Way], ...]) -> Way:
    instructions = sum(count * way.instructions for count, way in counted)
    return Way(round(instructions), round(sum(count * way.waits for count, way in counted)))


def _program_time(constants: Constants, code: ProductCode, multiplying: float, way: Way, loop: float) -> float:
    """Seconds of a program while as many as fit share its multiprocessor. `loop`: instructions beside tensor cores."""
    cycle = 1e-9 / constants.row.gigahertz
    waiting = way.waits * WAIT
    alone = multiplying + max(way.instructions * code.warps / ISSUED * cycle, way.instructions * cycle + waiting)
    if code.resident == 1:
        return alone
    issuing = (way.instructions + loop) * code.warps / ISSUED * cycle
    return max(alone, together(constants.row.norm, code.resident * multiplying, code.resident * issuing, waiting))


def _last_end(seconds: list[float], places: int) -> float:
    """When the last program ends, if each starts in order where one has ended."""
    ends = [0.0] * places
    for duration in seconds:
        heapq.heappush(ends, heapq.heappop(ends) + duration)
    return max(ends)


def _bytes(tables: Tables, named: dict, device: Device, resident: int) -> float:
    """Read from memory. Each wave reads its columns and rows; what of the rows is not cached, for every block again."""
    keys = named["keys"]
    token = keys.shape[-1] * keys.element_size()
    programs = tables.programs.tolist() * keys.shape[0]
    total, places = 0.0, device.multiprocessors * resident
    for first, last in pairwise([*range(0, len(programs), places), len(programs)]):
        wave = [(at // len(tables.programs), *programs[at]) for at in range(first, last)]
        rows = sum(end - begin for _, begin, end in {line[:3] for line in wave}) * token
        panels = {(layer, begin, end) for layer, _, _, begin, end in wave}
        columns = sum(int(tables.blocks[end - 1, 1] - tables.blocks[begin, 0]) for _, begin, end in panels) * token
        again = max(end - begin for _, begin, end in panels) - 1
        missed = 1 - min(1, CACHE_SHARE * device.cache / rows)
        total += columns + rows * (1 + again * missed)
    return total

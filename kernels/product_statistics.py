"""A forward pass without gradient, for embeddings of any width: the similarities are never in memory.

`frame_statistics` computes what `rows_torch.frame_statistics` does, for all rows of all sequences in all layers, with
one launch. The algorithm is explained in `product_statistics_kernels`. This module chooses tiles, divides the work and
launches.

**Division of the work.** A program has a block of rows and a panel: consecutive frames of a sequence. Long panels cost
few incomplete blocks and few starts; with short ones each multiprocessor gets its share, and more of the programs that
run at the same time have the same rows. A program reads its rows once for each block of columns, which is cheap only
while the rows of all running programs fit the second-level cache. `_cost` weighs this. `ROW_GROUP` blocks of rows visit
all panels before the next ones begin, so that running programs also share columns. A frame that is longer than a panel
is cut into slices, whose statistics are merged by a second kernel.

The plan depends on numbers of the batch that the host has, so it is made without waiting for the device, and kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import product_statistics_kernels as device
from .chunk import ChunkMatches, FrameStatistics, MatchTerms, Problem, TermDefinition
from .index import MatchIndex, RowIndex
from .rows_triton import inverse_norms, loss_terms
from .triton_launch import INTERPRETED, Tile, cdiv, launch


class ProductTile(NamedTuple):
    """The tile of a program, the part of the width that it multiplies at a time, and the pieces of its columns."""

    tile: Tile
    width: int
    pieces: int


# Registers and spills are those of ptxas for sm_90; tests/kernels/test_product_statistics_aot.py asserts them.
#
# A product whose operands come from the second-level cache is as fast as that cache if its tile is small: 128 x 256
# numbers need 43 multiplications for each byte, 128 x 128 only 32, and about 40 are needed. The accumulator takes 128
# of the 255 registers of each of two warpgroups' threads; what is left suffices for pieces of 32 columns. Three stages
# of 128 bytes of each embedding take 144 KiB, so one program runs on a multiprocessor.
WIDE = ProductTile(Tile(128, 256, 8, 3), 64, 8)
WIDE_TF32 = ProductTile(Tile(128, 256, 8, 3), 32, 8)
# Several values, ignored targets and skipped blocks need more registers beside an accumulator of half the size.
CROWDED = ProductTile(Tile(128, 128, 8, 3), 64, 4)
CROWDED_TF32 = ProductTile(Tile(128, 128, 8, 3), 32, 4)
# Below a width of `FEW`, adding the tile to the statistics takes more than a fifth of the product's time. With one
# warpgroup and 72 KiB, two programs share a multiprocessor: one adds while the other multiplies.
NARROW = ProductTile(Tile(64, 128, 4, 3), 64, 4)
NARROW_TF32 = ProductTile(Tile(64, 128, 4, 3), 32, 4)
FEW = 1024
# IEEE float32 has no tensor core. `serves` leaves it to the library; this tile is for tests.
IEEE = ProductTile(Tile(32, 32, 4, 1), 16, 2)

ROW_GROUP = 12  # blocks of rows
PANELS = (1 << 20, 128, 64, 32, 27, 24, 18, 16, 12, 9, 8, 6, 4, 3, 2)  # lengths to try, in blocks of columns
SLICE = 16  # blocks of columns: no slice is shorter, because each has statistics of its own
START = 0.15  # time to start a program, in blocks of columns
CACHE_BYTES = 30 << 20  # of rows that stay in the second-level cache (50 MB on an H100) beside the columns
# Reading rows from memory: 128 rows take 0.6 of the time that 132 multiprocessors need to multiply them by 256 columns
# (3.5 TB/s, 600 TFLOP/s); half of it is assumed to be hidden.
MEMORY_TIME = 0.3
MERGED_ROWS = 128  # rows of a program that merges slices


def serves(problem: Problem) -> bool:
    """Whether it can run on tensor cores, with loads of 16 bytes."""
    tensor_cores = problem.embeddings.dtype != torch.float32 or _tf32_allowed()
    return tensor_cores and all(_aligned(matrix) for matrix in (problem.embeddings, problem.keys))


def _aligned(matrix: Tensor) -> bool:
    """Whether the compiler may assume that each row begins at a multiple of 16 bytes."""
    *strides, inner = matrix.stride()
    return inner == 1 and matrix.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides)


def frame_match(problem: Problem) -> FrameStatistics:
    """[L, A, P] statistics of every row over every frame of its sequence."""
    return frame_statistics(problem, None)


def match_terms(problem: Problem, index: MatchIndex, terms: MatchTerms, definition: TermDefinition) -> None:
    """Write both terms of every match, [L, M]."""
    rows = slice(0, index.rows.row_token.shape[0])
    matches = ChunkMatches.of(index, rows, torch.empty_like(terms.corr), None, definition)
    loss_terms(frame_statistics(problem, matches), matches, None, terms)


def frame_statistics(problem: Problem, matches: ChunkMatches | None) -> FrameStatistics:
    """`rows_torch.frame_statistics` of all rows of the batch, [L, A, P]; writes `matches.positive`."""
    embeddings, keys, rows = problem.embeddings, problem.keys, problem.rows
    layers, tokens, embedding_width = embeddings.shape
    anchors, on_device = rows.row_token.shape[0], embeddings.device
    width = 0 if problem.values is None or problem.known is None else problem.values.shape[1]
    definition = None if matches is None else matches.definition
    ignored = definition is not None and definition.ignores_targets
    every_frame = definition is None or definition.every_frame
    if anchors == 0 or layers == 0:
        return FrameStatistics.of_empty_frames(layers, anchors, rows.longest, width, on_device, ignored)
    chosen = _tile(embeddings, crowded=width > 1 or ignored or not every_frame)
    plan = _plan(rows, layers, chosen.tile, embedding_width * embeddings.element_size(), on_device)
    key_norms = inverse_norms(keys)
    statistics = _uninitialised(layers, anchors, plan.places, width, on_device, ignored)
    launch(
        device.product_statistics, (plan.programs.shape[0], layers), chosen.tile,
        embeddings, *embeddings.stride(), key_norms if keys is embeddings else inverse_norms(embeddings),
        keys, *keys.stride(), key_norms, problem.temperature, rows.row_token, _known_values(problem),
        plan.programs, plan.blocks, plan.parts,
        *((None,) * 5 if matches is None else
          (matches.start, matches.longest, matches.target, matches.positive, matches.positive.stride(0))),
        *statistics[:5], statistics.negative_lse if ignored else None, anchors, plan.places, tokens, embedding_width,
        EXCLUDE_OWN=problem.exclude_own, EVERY_FRAME=every_frame, VALUES=width,
        EVEN_WIDTH=embedding_width % chosen.width == 0, UPCAST=INTERPRETED and embeddings.dtype == torch.bfloat16,
        PRECISION="tf32" if _tf32_allowed() else "ieee", BLOCK_WIDTH=chosen.width, PIECES=chosen.pieces,
    )  # fmt: skip
    return statistics if plan.row_blocks is None else _merged(statistics, plan, rows.longest, ignored)


def _merged(parts: FrameStatistics, plan: Plan, frames: int, ignored: bool) -> FrameStatistics:
    """The statistics of whole frames from those of their slices."""
    layers, anchors, places, width = parts.expected.shape
    assert plan.row_blocks is not None
    result = _uninitialised(layers, anchors, frames, width, parts.lse.device, ignored)
    launch(
        device.merge_parts, (plan.row_blocks.shape[0] * frames, layers), Tile(MERGED_ROWS, 1, 4),
        *parts[:5], parts.negative_lse if ignored else None, places, plan.row_blocks, plan.frame_places,
        *result[:5], result.negative_lse if ignored else None, anchors, frames,
        VALUES=width,
    )  # fmt: skip
    return result


def _uninitialised(
    layers: int, rows: int, frames: int, width: int, on_device: torch.device, ignored: bool
) -> FrameStatistics:
    """Memory that the kernels write."""

    def floats(*last: int) -> Tensor:
        return torch.empty(layers, rows, frames, *last, dtype=torch.float32, device=on_device)

    lse, best = floats(), torch.empty(layers, rows, frames, dtype=torch.int64, device=on_device)
    return FrameStatistics(lse, floats(), floats(width), best, floats(), floats() if ignored else lse)


def _known_values(problem: Problem) -> Tensor | None:
    """float32 [N, V], NaN where unknown: one array to read instead of two."""
    if problem.values is None or problem.known is None or problem.values.shape[1] == 0:
        return None
    return problem.values.masked_fill(problem.known[:, None] == 0, float("nan")).contiguous()


def _tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _tile(embeddings: Tensor, crowded: bool) -> ProductTile:
    """The tile for embeddings of this type and width; `crowded` kernels need more registers beside the accumulator."""
    narrow = embeddings.shape[-1] < FEW or not _roomy(embeddings.device)
    if embeddings.dtype == torch.float32 and not _tf32_allowed():
        return IEEE
    if embeddings.dtype == torch.float32:
        return NARROW_TF32 if narrow else CROWDED_TF32 if crowded else WIDE_TF32
    return NARROW if narrow else CROWDED if crowded else WIDE


def _roomy(on_device: torch.device) -> bool:
    """Whether a program may use 150 KiB of shared memory. Without a GPU the answer is that of sm_90."""
    return on_device.type != "cuda" or torch.cuda.get_device_capability(on_device) in ((8, 0), (8, 7), (9, 0), (10, 0))


@dataclass(frozen=True)
class Plan:
    """Which rows and tokens each program has, as tables on the device; a line of each is a tuple of that name."""

    programs: Tensor  # int64 [programs, 4], `Program`
    blocks: Tensor  # int64 [blocks, 4], `ColumnBlock`
    parts: Tensor  # int64 [parts, 4], `FramePart`
    places: int  # of parts, for each row
    row_blocks: Tensor | None  # int64 [row blocks, 3], `MergedRows`; None where no frame is cut
    frame_places: Tensor | None  # int64 [B, P + 1]


class Program(NamedTuple):
    first_row: int
    end_row: int
    first_block: int
    end_block: int


class ColumnBlock(NamedTuple):
    """The columns of one product, and the parts of frames that they belong to."""

    first_token: int
    end_token: int
    first_part: int
    end_part: int


class FramePart(NamedTuple):
    """A frame, or a slice of a long one."""

    first_token: int
    end_token: int
    frame: int  # within its sequence
    place: int  # in the results


class MergedRows(NamedTuple):
    """Rows of a program that merges slices."""

    first_row: int
    end_row: int
    sequence: int


class SequenceFrames(NamedTuple):
    rows: tuple[int, int]
    frame_ends: tuple[int, ...]  # tokens of the batch; frames that the sequence lacks are empty
    first_token: int


def _plan(rows: RowIndex, layers: int, tile: Tile, row_bytes: int, on_device: torch.device) -> Plan:
    ends = rows.frame_ends.tolist()
    sequences = []
    for span in rows.sequences:
        of_sequence = ends[span.frames[0] : span.frames[1]]
        missing = (rows.longest - len(of_sequence)) * [span.tokens[1]]
        sequences.append(SequenceFrames(span.rows, (*of_sequence, *missing), span.tokens[0]))
    processors, stream = 132, None
    if on_device.type == "cuda":
        processors = torch.cuda.get_device_properties(on_device).multi_processor_count
        stream = torch.cuda.current_stream(on_device).cuda_stream  # another stream must not use what this one copies
    return _cached_plan(tuple(sequences), layers, tile.rows, tile.columns, row_bytes, processors, on_device, stream)


@lru_cache(maxsize=64)
def _cached_plan(
    sequences: tuple[SequenceFrames, ...],
    layers: int,
    block_rows: int,
    block_columns: int,
    row_bytes: int,
    processors: int,
    on_device: torch.device,
    stream: int | None,
) -> Plan:
    best: tuple[float, Layout] | None = None
    for length in PANELS:
        layout = Layout.of(sequences, block_rows, block_columns, length)
        cost = _cost(layout, layers, block_rows * row_bytes, processors)
        if best is None or cost < 0.98 * best[0]:  # where it matters little, the longer panels
            best = cost, layout
    assert best is not None
    return best[1].plan(on_device)


def _cost(layout: Layout, layers: int, row_block_bytes: int, processors: int) -> float:
    """Time until the last program ends, in blocks of columns."""
    lengths = [program.end_block - program.first_block + START for program in layout.programs]
    if not lengths:
        return 0.0
    mean, total = sum(lengths) / len(lengths), sum(lengths) * layers / processors
    time = max(cdiv(len(lengths) * layers, processors) * mean, total + max(lengths) - mean)
    panels = len(lengths) / len({program.first_row for program in layout.programs})  # programs with the same rows
    if processors / panels * row_block_bytes > CACHE_BYTES:
        time *= 1.0 + MEMORY_TIME / panels
    return time


@dataclass(frozen=True)
class Layout:
    """The tables of a plan, as lists."""

    programs: list[Program]
    blocks: list[ColumnBlock]
    parts: list[FramePart]
    row_blocks: list[MergedRows]
    frame_places: list[list[int]]

    @staticmethod
    def of(sequences: tuple[SequenceFrames, ...], block_rows: int, block_columns: int, length: int) -> Layout:
        layout = Layout([], [], [], [], [])
        for number, sequence in enumerate(sequences):
            if sequence.rows[0] == sequence.rows[1]:
                layout.frame_places.append([0] * (len(sequence.frame_ends) + 1))
                continue
            first_part = len(layout.parts)
            layout.frame_places.append(layout._add_parts(sequence, max(length, SLICE) * block_columns))
            panels = list(layout._add_panels(first_part, block_columns, length))
            row_blocks = _ranges(*sequence.rows, block_rows)
            for group in range(0, len(row_blocks), ROW_GROUP):
                for panel in panels:
                    layout.programs.extend(Program(*rows, *panel) for rows in row_blocks[group : group + ROW_GROUP])
            layout.row_blocks.extend(MergedRows(*rows, number) for rows in _ranges(*sequence.rows, MERGED_ROWS))
        return layout

    def _add_parts(self, sequence: SequenceFrames, longest: int) -> list[int]:
        """Cut frames into parts of at most so many tokens; the places of each frame's parts."""
        places, begin = [0], sequence.first_token
        for frame, end in enumerate(sequence.frame_ends):
            slices = _ranges(begin, end, longest) or [(begin, end)]
            self.parts.extend(FramePart(*ends, frame, places[-1] + nth) for nth, ends in enumerate(slices))
            places.append(places[-1] + len(slices))
            begin = end
        return places

    def _add_panels(self, first_part: int, block_columns: int, length: int) -> Iterator[tuple[int, int]]:
        """Divide the parts from `first_part` on into panels of about so many blocks; the blocks of each."""
        part = first_part
        while part < len(self.parts):
            begin, end_part = self.parts[part].first_token, part + 1
            while end_part < len(self.parts) and self.parts[end_part].end_token - begin <= length * block_columns:
                end_part += 1
            first_block = len(self.blocks)
            end = self.parts[end_part - 1].end_token
            for start, stop in _ranges(begin, end, block_columns) or [(begin, end)]:
                after = part + 1
                while after < end_part and (self.parts[after].first_token < stop or stop == end):
                    after += 1
                self.blocks.append(ColumnBlock(start, stop, part, after))
                part = after - 1 if self.parts[after - 1].end_token > stop else after
            yield first_block, len(self.blocks)
            part = end_part

    def plan(self, on_device: torch.device) -> Plan:
        def table(lines: Iterable[Iterable[int]]) -> Tensor:
            return torch.tensor([*map(tuple, lines)], dtype=torch.int64).to(on_device, non_blocking=True)

        places = max((line[-1] for line in self.frame_places), default=0)
        cut = any(len(line) - 1 != line[-1] for line in self.frame_places if line[-1])
        return Plan(
            programs=table(self.programs),
            blocks=table(self.blocks),
            parts=table(self.parts),
            places=places,
            row_blocks=table(self.row_blocks) if cut else None,
            frame_places=table(self.frame_places) if cut else None,
        )


def _ranges(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]

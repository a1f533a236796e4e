"""The memory of a block: what is allocated once for a sequence, and used for every block of all its layers.

Nothing is allocated or sliced more often than it must be: an allocation or a view costs the host about a microsecond.
For the same reason most of these dataclasses are not frozen: to create a frozen one takes several times as long. Only
`Part` is ever changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .blocks import Blocks, Scratch, Sizes, in_gradient
from .chunk import ChunkMatches, FrameStatistics, FrameUpstream, PartMemory, RowChunk
from .products import Products
from .replay import scratch


@dataclass(frozen=True)
class Gradients:
    """Memory for the gradients that are needed, and whether that of the temperature is."""

    embeddings: Tensor | None = None  # [L, N, D]
    keys: Tensor | None = None  # [L, N, D]; `embeddings` itself where the keys are the embeddings
    temperature: bool = False
    scale: Tensor | None = None  # float32 [L], written: the powers of two by which stored gradients are multiplied

    @cached_property
    def any(self) -> bool:
        return self.embeddings is not None or self.keys is not None or self.temperature


@dataclass
class Part:
    """Some rows of a block, and what is computed for them; used again for the same rows of other layers."""

    layers: slice
    rows: slice  # of the batch
    local: slice  # of the block
    frames: int  # P, of the sequence
    boost: Tensor | None  # float32 [G], factor of upstream gradients; see `fp16_boost`
    memory: PartMemory
    matches: ChunkMatches | None = None
    statistics: FrameStatistics | None = None
    upstream: FrameUpstream | None = None  # gradients of `statistics`
    anchors: Tensor | None = None  # [G, r, D], of the block's
    chunks: dict[int, RowChunk] = field(default_factory=dict)  # by their first column; see `RowBlock.chunk`
    gradients: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # [G, r, c], of the block's `X`: `gradient`

    def gradient(self, x: Tensor, columns: slice) -> Tensor:
        """The rows of this part in the `X` of some columns. Only where `X` has memory of its own is that the same for
        all layers."""
        key = columns.start, int(x.storage_offset())
        found = self.gradients.get(key)
        if found is None:
            found = self.gradients[key] = piece(x, 1, self.local)
        return found

    def boosted(self, values: Tensor) -> Tensor:
        """These layers of weights or upstream gradients [L, ...], times their boost."""
        values = piece(values, 0, self.layers)
        return values if self.boost is None else values * self.boost.view(-1, *[1] * (values.dim() - 1))


@dataclass
class Buffers:
    """Memory of a block, allocated once for a sequence. Smaller blocks use the beginning of it."""

    norms: Tensor  # float32 [G, n], inverse norms of the tokens
    row_norms: Tensor  # float32 [G, A], those of the anchors, where these are tokens
    anchors: Tensor  # [G, R, D], in the type of the products
    x: Tensor | None  # [G, R, c], in the type of the products; `similarity` where that is float32; None: see `x_of`
    similarity: Tensor  # float32 [G, part, c]
    row_gradient: Tensor | None  # float32 [G, R, D]; in the memory of `similarity` where `Scratch` says so
    panel: Tensor | None  # float32 [G, panel, D], where `Scratch` says so; None where nothing needs it
    rest: Tensor | None  # [G, R, n - R], the columns of `x` that are no rows; None where it is not folded
    parts: dict[tuple[int, int, int], Part] = field(default_factory=dict)  # by number of layers, first and last row
    of_part: dict[tuple[int, int, int], PartMemory] = field(default_factory=dict)  # the same, rows counted in the block

    @staticmethod
    def allocate(blocks: Blocks, sizes: Sizes, products: Products, like: Tensor) -> Buffers:
        layers, rows, columns, width = blocks.layers, blocks.rows, blocks.columns, sizes.width
        begin = Scratch.of(sizes, blocks)
        block = scratch(like.new_empty(begin.size, dtype=torch.float32))
        anchors = scratch(like.new_empty((layers, rows, width), dtype=products.element))
        similarity = block.as_strided((layers, blocks.part, columns), (blocks.part * columns, columns, 1))
        norms, row_norms = (
            scratch(like.new_empty((layers, count), dtype=torch.float32)) for count in (sizes.tokens, sizes.rows)
        )
        if not sizes.backward:
            return Buffers(norms, row_norms, anchors, None, similarity, None, None, None)
        x: Tensor | None = similarity
        if sizes.element < 4:
            size = layers, rows, columns
            x = None if in_gradient(sizes, blocks) else scratch(like.new_empty(size, dtype=products.element))
        strides = rows * width, width, 1
        row_gradient, panel = block.as_strided((layers, rows, width), strides, begin.row_gradient), None
        if blocks.panel and (blocks.folded or not sizes.wide):
            strides = blocks.panel * width, width, 1
            panel = block.as_strided((layers, blocks.panel, width), strides, begin.panel)
        rest = None
        if blocks.folded:
            rest = scratch(like.new_empty((layers, rows, sizes.rest_pitch), dtype=products.element))[..., : sizes.left]
        return Buffers(norms, row_norms, anchors, x, similarity, row_gradient, panel, rest)

    def x_of(self, result: Tensor | None, groups: int, rows: int, columns: int) -> Tensor:
        """`X`, [G, R, c]: without memory of its own, at the beginning of each layer of the gradient, [G, n, D]."""
        if self.x is not None:
            return shaped(self.x, groups, rows, columns)
        assert result is not None
        return result.as_strided((groups, rows, columns), (result.stride(0), columns, 1))

    def part(self, of_layers: slice, frames: int, boost: Tensor | None, rows: slice, block: slice) -> Part:
        """Some rows of a block for these layers. Views and launches are prepared for the first ones only."""
        layers = of_layers.stop - of_layers.start
        part = self.parts.get((layers, rows.start, rows.stop))
        if part is None:
            local = slice(rows.start - block.start, rows.stop - block.start)
            memory = self.of_part.setdefault((layers, local.start, local.stop), PartMemory())
            part = Part(of_layers, rows, local, frames, boost, memory)
            self.parts[layers, rows.start, rows.stop] = part
        part.layers, part.boost = of_layers, boost
        part.statistics = part.upstream = None
        return part


def piece(values: Tensor, dimension: int, span: slice) -> Tensor:
    """`span` of a dimension; the tensor itself where that is all of it."""
    if span.start == 0 and span.stop == values.shape[dimension]:
        return values
    return values.narrow(dimension, span.start, span.stop - span.start)


def shaped(buffer: Tensor, *shape: int) -> Tensor:
    """The beginning of `buffer` in this shape [G, ., .]; the buffer itself where it has this shape."""
    if buffer.shape == shape:
        return buffer
    _, rows, columns = shape
    return buffer.as_strided(shape, (rows * columns, columns, 1))  # one view, not two


def slices(start: int, stop: int, size: int) -> list[slice]:
    """`start` to `stop` in pieces of `size`."""
    if start < stop <= start + size:
        return [slice(start, stop)]
    return [slice(at, min(at + size, stop)) for at in range(start, stop, max(1, size))]

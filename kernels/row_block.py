"""A block of anchor rows against the tokens of one sequence: its memory, its products, and where gradients go.

`chunked` explains the order of the steps. Nothing here launches more than it must: sizes are numbers of the host, and a
tensor that is needed whole is not sliced, because each view costs the host about a microsecond. For the same reason
these dataclasses are not frozen: to create a frozen one takes several times as long. Only `Part` is ever changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .blocks import Blocks, Sizes
from .chunk import ChunkMatches, FrameStatistics, FrameUpstream, Problem, RowChunk, RowOperations
from .index import SequenceSpan
from .products import Products


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
    """Some rows of a block, and what is computed for them."""

    layers: slice
    rows: slice  # of the batch
    local: slice  # of the block
    frames: int  # P, of the sequence
    boost: Tensor | None  # float32 [G], factor of upstream gradients; see `fp16_boost`
    matches: ChunkMatches | None = None
    statistics: FrameStatistics | None = None
    upstream: FrameUpstream | None = None  # gradients of `statistics`

    def boosted(self, values: Tensor) -> Tensor:
        """These layers of weights or upstream gradients [L, ...], times their boost."""
        values = piece(values, 0, self.layers)
        return values if self.boost is None else values * self.boost.view(-1, *[1] * (values.dim() - 1))


@dataclass
class Buffers:
    """Memory of a block, allocated once for a sequence. Smaller blocks use the beginning of it."""

    anchors: Tensor  # [G, R, D], in the type of the products
    similarity: Tensor  # float32 [G, part, c]
    x: Tensor  # [G, R, c], in the type of the products; `similarity` itself where that is float32
    row_gradient: Tensor  # float32 [G, R, D]; where possible the memory of `similarity`, as large as the larger of them

    @staticmethod
    def allocate(blocks: Blocks, sizes: Sizes, products: Products, like: Tensor) -> Buffers:
        layers, rows = blocks.layers, blocks.rows
        in_place, whole = sizes.element == 4, blocks.columns == sizes.tokens
        shared = sizes.backward and whole and not in_place
        anchors = like.new_empty((layers, rows, sizes.width), dtype=products.element)
        shape = layers, blocks.part, blocks.columns
        if shared and math.prod(shape) < anchors.numel():
            shape = layers, rows, sizes.width
        x = row_gradient = similarity = like.new_empty(shape, dtype=torch.float32)
        if sizes.backward and not in_place:
            x = like.new_empty((layers, rows, blocks.columns), dtype=products.element)
        if sizes.backward and not shared:
            row_gradient = torch.empty_like(anchors, dtype=torch.float32)
        return Buffers(anchors, similarity, x, row_gradient)


@dataclass
class LayerGroup:
    """One sequence in a group of layers, and the accumulator of its candidates' gradient."""

    problem: Problem
    layers: slice
    sequence: SequenceSpan
    products: Products
    operations: RowOperations
    gradients: Gradients
    raw: Tensor  # [G, n, D], the candidates
    tokens: Tensor  # [G, n, D], the same as the products take them: `raw`, or normalised
    token_norms: Tensor  # float32 [G, n], inverse norms of `raw`
    token_scale: Tensor  # float32 [G, n], of `tokens`: `token_norms`, or ones where `tokens` are normalised
    boost: Tensor | None  # float32 [G]
    stored_scale: Tensor | None  # float32 [G], see `Gradients.scale`
    total: Tensor | None  # float32 [G, n, D], gradient of `tokens`; `result` itself where that is float32
    result: Tensor | None  # [G, n, D], of `gradients.keys`
    cut_offsets: dict[int, Tensor] = field(default_factory=dict)  # see `offsets_in`

    @staticmethod
    def of(
        problem: Problem,
        layers: slice,
        sequence: SequenceSpan,
        products: Products,
        operations: RowOperations,
        upstream: Sequence[Tensor],
        gradients: Gradients,
    ) -> LayerGroup:
        span = slice(*sequence.tokens)
        raw = tokens = piece(piece(problem.keys, 0, layers), 1, span)
        norms = scale = operations.inverse_norms(raw)
        boost, stored_scale = None, None if gradients.scale is None else gradients.scale[layers]
        if products.normalised:
            tokens, scale = normalised(raw, norms), torch.ones_like(norms)
            boost = fp16_boost([value[layers] for value in upstream], problem.temperature)
        result = total = None
        if gradients.keys is not None:
            result = piece(piece(gradients.keys, 0, layers), 1, span)
            total = result if result.dtype == torch.float32 else torch.empty_like(result, dtype=torch.float32)
            if sequence.row_count == 0:
                total.zero_()
        return LayerGroup(
            problem, layers, sequence, products, operations, gradients, raw, tokens, norms, scale, boost, stored_scale,
            total, result,
        )  # fmt: skip

    def block(self, rows: slice, blocks: Blocks, buffers: Buffers) -> RowBlock:
        """A block of rows: anchors gathered, with their inverse norms."""
        problem = self.problem
        own = piece(problem.rows.row_column, 0, rows)  # [R]
        groups, _, width = self.tokens.shape
        count = rows.stop - rows.start
        anchors = shaped(buffers.anchors, groups, count, width)
        if problem.keys is problem.embeddings:
            source, index = self.tokens, own
            scale = norms = self.token_scale.index_select(1, own)
        else:
            source, index = piece(problem.embeddings, 0, self.layers), problem.rows.row_token[rows]
            scale = norms = self.operations.inverse_norms(source.index_select(1, index))
            if self.products.normalised:
                source, index = normalised(source.index_select(1, index), norms), torch.arange(count).to(own)
                scale = torch.ones_like(norms)
        self.operations.gather_rows(source, index, anchors)
        parts = [
            Part(self.layers, part, slice(part.start - rows.start, part.stop - rows.start), self.sequence.frame_count,
                 self.boost)
            for part in slices(rows.start, rows.stop, blocks.part)
        ]  # fmt: skip
        row_gradient = shaped(buffers.row_gradient, groups, count, width) if self.gradients.any else None
        offsets = problem.rows.frame_columns(self.sequence)
        return RowBlock(self, rows, parts, own, offsets, anchors, norms, scale, buffers, row_gradient)

    def offsets_in(self, columns: slice) -> Tensor:
        """int64 [P + 1]: the frames as ranges of some columns, counted from the first; computed once for all blocks."""
        found = self.cut_offsets.get(columns.start)
        if found is None:
            all_columns = self.problem.rows.frame_columns(self.sequence)
            found = all_columns.clamp(columns.start, columns.stop) - columns.start
            self.cut_offsets[columns.start] = found
        return found

    def rescale(self, gradient: Tensor) -> None:
        """Remove the boost from [G, ., D], and apply the scale in which gradients are stored."""
        if self.stored_scale is not None and self.boost is not None:
            gradient.mul_((self.stored_scale / self.boost)[:, None, None])
        elif self.boost is not None:
            gradient.div_(self.boost[:, None, None])
        elif self.stored_scale is not None:
            gradient.mul_(self.stored_scale[:, None, None])

    def finish(self) -> None:
        """Apply the Jacobian of the normalisation to the accumulated gradient."""
        if self.total is None or self.result is None:
            return
        self.rescale(self.total)
        self.operations.project_gradient(self.total, self.raw, self.token_norms, self.result, self.products.normalised)


@dataclass
class RowBlock:
    """The anchors of a block of rows, and the memory of its products."""

    group: LayerGroup
    rows: slice  # of the batch
    parts: list[Part]
    own: Tensor  # int64 [R], column of each row's own token
    frame_columns: Tensor  # int64 [P + 1]
    anchors: Tensor  # [G, R, D]
    row_norms: Tensor  # float32 [G, R], inverse norms of the raw anchors
    row_scale: Tensor  # float32 [G, R], of `anchors`
    buffers: Buffers
    row_gradient: Tensor | None  # float32 [G, R, D]
    cut_own: dict[int, Tensor] = field(default_factory=dict)  # see `_own_in`

    def chunk(self, part: Part, columns: slice) -> RowChunk:
        """Similarities of some rows with some columns."""
        group, problem = self.group, self.group.problem
        tokens = piece(group.tokens, 1, columns)  # [G, c, D]
        offsets, own, token_scale = self.frame_columns, self.own, group.token_scale
        if tokens is not group.tokens:  # not all columns
            offsets, own, token_scale = group.offsets_in(columns), self._own_in(columns), piece(token_scale, 1, columns)
        anchors, row_scale = self.anchors, self.row_scale
        if len(self.parts) > 1:
            own = piece(own, 0, part.local)
            anchors, row_scale = piece(anchors, 1, part.local), piece(row_scale, 1, part.local)
        similarity = shaped(self.buffers.similarity, tokens.shape[0], anchors.shape[1], tokens.shape[1])
        group.products.similarity(anchors, tokens, out=similarity)
        first_token = group.sequence.tokens[0]
        span = slice(first_token + columns.start, first_token + columns.stop)
        return RowChunk(
            similarity=similarity,
            row_scale=row_scale,
            token_scale=token_scale,
            temperature=problem.temperature,
            own_column=own,
            exclude_own=problem.exclude_own,
            frame_offsets=offsets,
            first_token=span.start,
            values=None if problem.values is None else piece(problem.values, 0, span),
            known=None if problem.known is None else piece(problem.known, 0, span),
            multiple=_largest_power_of_two(problem.rows.frame_multiple | columns.start | columns.stop),
        )

    def _own_in(self, columns: slice) -> Tensor:
        """int64 [R]: `own`, counted from the first of these columns; computed once for all parts."""
        if columns.start not in self.cut_own:
            self.cut_own[columns.start] = self.own - columns.start
        return self.cut_own[columns.start]

    def x(self, columns: slice) -> Tensor:
        """`X` of these columns, [G, R, c], to be written."""
        groups, rows, _ = self.anchors.shape
        return shaped(self.buffers.x, groups, rows, columns.stop - columns.start)

    def multiply(self, x: Tensor, columns: slice) -> None:
        """Both products with `X`: the gradient of the rows, and that of the columns."""
        group, tokens = self.group, piece(self.group.tokens, 1, columns)
        assert self.row_gradient is not None
        group.products.row_gradient(x, tokens, out=self.row_gradient, accumulate=columns.start > 0)
        if group.total is not None:
            later = self.rows.start > group.sequence.rows[0]
            group.products.token_gradient(x, self.anchors, out=piece(group.total, 1, columns), accumulate=later)

    def finish(self, radial: list[Tensor]) -> None:
        """Add the gradient of the rows where it belongs."""
        group, row_gradient = self.group, self.row_gradient
        assert row_gradient is not None
        gradients, problem = group.gradients, group.problem
        if gradients.temperature:
            per_layer = (self.anchors * row_gradient).sum((1, 2))  # [G]
            radial.append((per_layer if group.boost is None else per_layer / group.boost).sum())
        if problem.keys is problem.embeddings:
            if group.total is not None:
                group.operations.add_rows(row_gradient, self.own, group.total)
        elif gradients.embeddings is not None:
            group.rescale(row_gradient)
            tokens = problem.rows.row_token[self.rows]
            raw = problem.embeddings[group.layers].index_select(1, tokens)
            unit = group.products.normalised
            group.operations.project_gradient(row_gradient, raw, self.row_norms, row_gradient, unit)
            gradients.embeddings[group.layers].index_copy_(1, tokens, row_gradient.to(gradients.embeddings.dtype))


def normalised(embeddings: Tensor, inverse_norm: Tensor) -> Tensor:
    """Unit embeddings in the same type: [G, n, D], [G, n]."""
    return (embeddings * inverse_norm[..., None]).to(embeddings.dtype)


def fp16_boost(upstream: Sequence[Tensor], temperature: Tensor) -> Tensor | None:
    """[G] powers of two that bring `X` near 1, or None without upstream gradients, each [G, ...].

    In a mean over many matches `weight / tau` is below the smallest number that float16 has. Upstream gradients are
    multiplied by the boost, the results of the products divided by it.
    """
    if not upstream or any(value.numel() == 0 for value in upstream):
        return None
    largest = torch.stack([value.abs().flatten(1).amax(1) for value in upstream]).amax(0)  # [G]
    return (largest / temperature).clamp(1e-30, 1e30).log2().round().neg().exp2()


def fp16_scale(upstream: Sequence[Tensor], temperature: Tensor, inverse_norms: Tensor) -> Tensor:
    """[L] powers of two that bring the gradient of embeddings into the range of float16.

    The gradient of a mean is about `weight / (tau |e|)`, often below 1e-5, where float16 has few digits or none. A
    caller's loss scale comes too late for a gradient that was rounded in the forward pass, so it is stored larger.
    """
    boost = fp16_boost(upstream, temperature)
    if inverse_norms.numel() == 0:
        return inverse_norms.new_ones(inverse_norms.shape[0])
    norm = inverse_norms.median(dim=1).values.reciprocal().clamp(2.0**-20, 2.0**20).log2().round().exp2()
    return norm if boost is None else norm * boost


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


def _largest_power_of_two(number: int) -> int:
    """The largest power of two that divides `number`, at most 16."""
    return min(16, number & -number) if number else 16

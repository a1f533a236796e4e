"""The strategy for wide embeddings: row chunks, library matrix products, fused row operations between them.

A full-width gradient accumulator does not fit on chip once `D` passes a few hundred, and a kernel that tried would
need atomics or locks: slow, and never twice the same. So the similarity matrix is cut into chunks of rows that fit a
fixed workspace, and each chunk goes once through

    similarity = A E^T                    library product, float32 result
    frame_statistics, match_terms         one pass over the chunk: lse, expected values, arg-max, both loss terms
    X = similarity_gradient               in place, or in the narrower type that the products want
    rows   = X E                          library product
    tokens = tokens + X^T A               library product, accumulated chunk by chunk in a fixed order

When the weight of each term is known beforehand (any mean or sum is), forward and backward are this one pass: three
products and nothing recomputed. Without gradient it stops after the second line. Given arbitrary upstream gradients,
the same pass runs again with them as weights: four products.

Raw embeddings enter the products; norms are applied to the products' results and to `X` (see `rows_torch`). Each row
of a chunk is a different token, so adding `rows` to the gradient at the anchors has one writer per address. Nothing
is atomic, nothing depends on timing: two runs agree to the last bit.

Workspace per row of a chunk: `4 n` bytes of similarity, `2 n` more for a narrower `X`, `8 D` for the anchor and its
gradient. Where the input is narrower than float32, one sequence's gradient is accumulated in float32 beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from .chunk import FrameStatistics, FrameUpstream, MatchRuns, MatchScales, MatchTerms, RowChunk
from .plan import MatchPlan, RowPlan, SequenceSpan
from .products import Products


@dataclass(frozen=True, kw_only=True)
class ChunkedEngine:
    """Runs the strategy with one set of row operations (`rows_cpp`, `rows_triton` or `rows_torch`)."""

    operations: ModuleType
    workspace_bytes: int
    fused_pass: Callable[..., bool] | None = None  # all three row operations of the loss at once, where it can

    def match_terms(
        self,
        embeddings: Tensor,  # [L, N, D]
        plan: MatchPlan,
        temperature: Tensor,  # float32 []
        scales: MatchScales | None,  # [L, M]; with them, gradients are computed
        terms: MatchTerms,  # [L, M], filled in
        sequence_negatives: bool,
        eps: float,
        gradient: Tensor | None,  # like `embeddings`, filled in
        want_temperature: bool,
    ) -> Tensor | None:
        """Both terms of every match; with `scales`, the gradients of `sum scales * terms`."""
        walk = _Walk(
            self, embeddings, plan.rows, temperature, plan.values, plan.known, True, gradient, want_temperature, scales
        )
        for part in walk.parts():
            runs = _runs(plan, part)
            layer_scales = None if scales is None else MatchScales(*(part.boosted(scale) for scale in scales))
            part_terms = terms.of_layers(part.layers)
            if self.fused_pass is not None and self.fused_pass(
                part.chunk, runs, layer_scales, part_terms, sequence_negatives, eps, part.x
            ):
                continue
            statistics = self.operations.frame_statistics(part.chunk, runs, sequence_negatives)
            upstream = self.operations.match_terms(
                part.chunk, statistics, runs, layer_scales, part_terms, sequence_negatives, eps
            )
            if part.x is not None:
                self.operations.similarity_gradient(part.chunk, statistics, upstream, runs, layer_scales, part.x)
        return walk.temperature_gradient()

    def frame_match(
        self,
        embeddings: Tensor,  # [L, N, D]
        rows: RowPlan,
        temperature: Tensor,  # float32 []
        values: Tensor | None,  # float32 [N, V]
        known: Tensor | None,  # bool [N]
        exclude_own: bool,
    ) -> FrameStatistics:
        """[L, A, P] statistics of every row over every frame of its sequence; `best` is a token of the batch."""
        width = 0 if values is None else values.shape[1]
        layers, anchors = embeddings.shape[0], rows.row_token.shape[0]
        whole = FrameStatistics.nothing(layers, anchors, rows.longest, width, embeddings.device)
        for part in _Walk(self, embeddings, rows, temperature, values, known, exclude_own, None, False).parts():
            found = self.operations.frame_statistics(part.chunk, None, True)
            best = torch.where(found.best < 0, -1, found.best + part.span.tokens[0])
            for to, value in zip(whole, found._replace(best=best), strict=True):
                to[part.layers, part.block, : part.span.frame_count] = value
        return whole

    def frame_match_gradient(
        self,
        embeddings: Tensor,
        rows: RowPlan,
        temperature: Tensor,
        values: Tensor | None,
        known: Tensor | None,
        exclude_own: bool,
        statistics: FrameStatistics,
        upstream: FrameUpstream,
        gradient: Tensor | None,
        want_temperature: bool,
    ) -> Tensor | None:
        """The gradients of `sum upstream.lse * lse + sum upstream.expected * expected`."""
        walk = _Walk(
            self, embeddings, rows, temperature, values, known, exclude_own, gradient, want_temperature, upstream
        )
        for part in walk.parts():
            frames = slice(0, part.span.frame_count)
            self.operations.similarity_gradient(
                part.chunk,
                FrameStatistics(*(value[part.layers, part.block, frames].contiguous() for value in statistics)),
                FrameUpstream(*(part.boosted(value)[:, part.block, frames].contiguous() for value in upstream)),
                None,
                None,
                part.x,
            )
        return walk.temperature_gradient()


@dataclass(frozen=True)
class _Part:
    """One chunk on its way: the caller fills `x` before it asks for the next one."""

    layers: slice
    span: SequenceSpan
    block: slice  # rows of the batch
    chunk: RowChunk
    x: Tensor | None  # [G, R, n], to be filled with dL/d(raw dot product)
    boost: Tensor | None  # float32 [G], what upstream numbers are to be multiplied with

    def boosted(self, upstream: Tensor) -> Tensor:
        """These layers of an upstream [L, ...], times their boost."""
        cut = upstream[self.layers]
        return cut if self.boost is None else cut * self.boost.view(-1, *[1] * (cut.dim() - 1))


@dataclass(frozen=True)
class _Buffers:
    """The workspace: flat, and seen by each chunk in its own shape."""

    width: int
    anchors: Tensor
    similarity: Tensor
    x: Tensor
    row_gradient: Tensor

    def views(self, groups: int, rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def view(flat: Tensor, last: int) -> Tensor:
            return flat[: groups * rows * last].view(groups, rows, last)

        gradient = self.row_gradient
        return (
            view(self.anchors, self.width),
            view(self.similarity, tokens),
            view(self.x, tokens),
            view(gradient, self.width) if gradient.numel() else gradient,
        )


@dataclass
class _Walk:
    """Every layer group, sequence and row chunk once, in a fixed order, with the products before and after."""

    engine: ChunkedEngine
    embeddings: Tensor
    rows: RowPlan
    temperature: Tensor
    values: Tensor | None
    known: Tensor | None
    exclude_own: bool
    gradient: Tensor | None
    want_temperature: bool
    upstream: tuple[Tensor, ...] | None = None  # each [L, ...]: scales of terms, or gradients of statistics
    slopes: list[Tensor] = field(default_factory=list)

    def parts(self) -> Iterator[_Part]:
        products = Products.of(self.embeddings)
        operations = self.engine.operations
        buffers = self._buffers(products)
        for layers in self._layer_groups(products):
            tokens = self.embeddings[layers]  # [G, N, D]
            scale = operations.inverse_norms(tokens)  # [G, N]
            for span in self.rows.sequences():
                first, last = span.tokens
                total = None  # the last one goes before the next one comes
                total = self._accumulator(layers, span)
                sequence, sequence_scale = tokens[:, first:last], scale[:, first:last]
                boost = self._boost(products, layers, sequence_scale)
                yield from self._sequence(products, buffers, layers, span, sequence, sequence_scale, total, boost)
                if self.gradient is not None and total is not None:
                    if boost is not None:
                        total.div_(boost[:, None, None])
                    operations.project_gradient(total, sequence, sequence_scale, self.gradient[layers, first:last])

    def temperature_gradient(self) -> Tensor | None:
        """`-(1 / tau) sum_i e_i . (X E)_i`: every row's share was noted when its chunk passed."""
        if not self.want_temperature:
            return None
        if not self.slopes:
            return torch.zeros((), device=self.embeddings.device)
        return -torch.stack(self.slopes).sum() / self.temperature

    def _sequence(
        self,
        products: Products,
        buffers: _Buffers,
        layers: slice,
        span: SequenceSpan,
        tokens: Tensor,  # [G, n, D]
        scale: Tensor,  # [G, n]
        total: Tensor | None,  # [G, n, D]
        boost: Tensor | None,  # [G]
    ) -> Iterator[_Part]:
        first, last = span.tokens
        offsets = self.rows.frame_offsets[span.frames[0] : span.frames[1] + 1] - first
        if total is not None and span.rows[0] == span.rows[1]:
            total.zero_()
        for block in self._blocks(products, span, tokens):
            own = self.rows.row_token[block] - first  # [R]
            anchors, similarity, x, row_gradient = buffers.views(tokens.shape[0], own.shape[0], last - first)
            anchors.copy_(tokens[:, own])
            products.similarity(anchors, tokens, similarity)
            chunk = RowChunk(
                similarity=similarity,
                row_scale=scale[:, own],
                token_scale=scale,
                temperature=self.temperature,
                own_token=own,
                exclude_own=self.exclude_own,
                frame_offsets=offsets,
                values=None if self.values is None else self.values[first:last],
                known=None if self.known is None else self.known[first:last],
            )
            yield _Part(layers, span, block, chunk, x if self._backward else None, boost)
            if self._backward:
                products.row_gradient(x, tokens, row_gradient)
            if self.want_temperature:
                per_layer = (anchors * row_gradient).sum((1, 2))  # [G]
                self.slopes.append((per_layer if boost is None else per_layer / boost).sum())
            if total is not None:
                products.token_gradient(x, anchors, total, accumulate=block.start > span.rows[0])
                total.index_add_(1, own, row_gradient)

    def _boost(self, products: Products, layers: slice, scale: Tensor) -> Tensor | None:
        """[G] powers of two that lift `X` into float16's range: a mean's `weight r_i r_k / tau` is about 1e-8 for
        embeddings a few thousand wide, below the smallest number float16 has. The products are divided by it."""
        if products.element != torch.float16 or not self.upstream or any(u[layers].numel() == 0 for u in self.upstream):
            return None
        largest = torch.stack([u[layers].abs().flatten(1).amax(1) for u in self.upstream]).amax(0)  # [G]
        size = largest * scale.median(dim=1).values.square() / self.temperature
        return size.clamp(1e-30, 1e30).log2().round().neg().exp2()

    @property
    def _backward(self) -> bool:
        return self.gradient is not None or self.want_temperature

    def _buffers(self, products: Products) -> _Buffers:
        """Room for the largest chunk of all, taken once."""
        group = self._layer_groups(products)[0].stop
        cells = rows = 0
        for span in self.rows.sequences():
            for block in self._blocks(products, span, self.embeddings[:group])[:1]:
                cells = max(cells, group * (block.stop - block.start) * span.token_count)
                rows = max(rows, group * (block.stop - block.start))
        width = self._width
        like = self.embeddings
        similarity = like.new_empty(cells, dtype=torch.float32)
        narrow = self._backward and products.element != torch.float32
        return _Buffers(
            width=width,
            anchors=like.new_empty(rows * width, dtype=products.element),
            similarity=similarity,
            x=like.new_empty(cells, dtype=products.element) if narrow else similarity,
            row_gradient=like.new_empty(rows * width if self._backward else 0, dtype=torch.float32),
        )

    def _accumulator(self, layers: slice, span: SequenceSpan) -> Tensor | None:
        """float32 [G, n, D]: the gradient itself where it is float32."""
        if self.gradient is None:
            return None
        out = self.gradient[layers, span.tokens[0] : span.tokens[1]]
        return out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device=out.device)

    def _layer_groups(self, products: Products) -> list[slice]:
        """Several layers at once where even together they are small: on a GPU, where launches cost more than work."""
        layers = self.embeddings.shape[0]
        size = 1
        if self.embeddings.is_cuda:
            per_layer = max(
                (span.rows[1] - span.rows[0]) * self._bytes_per_row(products, span) + 4 * span.token_count * self._width
                for span in self.rows.sequences()
            )
            size = min(layers, max(1, self.engine.workspace_bytes // max(1, per_layer)))
        return [slice(start, min(start + size, layers)) for start in range(0, layers, size)]

    def _blocks(self, products: Products, span: SequenceSpan, tokens: Tensor) -> list[slice]:
        """Rows in chunks of equal size, as few as the workspace allows."""
        start, end = span.rows
        fitting = max(1, self.engine.workspace_bytes // (tokens.shape[0] * self._bytes_per_row(products, span)))
        chunks = -(-(end - start) // fitting)
        size = -(-(end - start) // max(1, chunks))
        return [slice(at, min(at + size, end)) for at in range(start, end, max(1, size))]

    def _bytes_per_row(self, products: Products, span: SequenceSpan) -> int:
        x_bytes = 0 if products.element == torch.float32 else 2
        return (4 + x_bytes) * span.token_count + 8 * self._width

    @property
    def _width(self) -> int:
        return self.embeddings.shape[-1]


def _runs(plan: MatchPlan, part: _Part) -> MatchRuns:
    longest = plan.rows.longest
    return MatchRuns(
        start=plan.run_start[part.block.start * longest : part.block.stop * longest + 1],
        longest=longest,
        order=plan.order,
        target=plan.target,
        depth=plan.depth,
        counts=plan.counts,
        first_token=part.span.tokens[0],
    )

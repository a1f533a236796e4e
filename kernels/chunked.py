"""The strategy for wide embeddings: row chunks, library matrix products, fused row operations between them.

A gradient accumulator of width `D` does not fit on chip once `D` exceeds a few hundred. A kernel that accumulates in
memory instead needs atomics or locks, which are slow and not reproducible. So the similarity matrix is cut into chunks
of rows that fit a fixed workspace, and each chunk passes once through

    anchors    = E[rows]                  gathered
    similarity = anchors E^T              library product, float32 result
    row pass                              frame_statistics, loss_terms: lse, expected values, arg-max, both loss terms;
                                          X = similarity_gradient, in place or in the narrower type of the products
    row gradient   = X E                  library product
    token gradient += X^T anchors         library product, accumulated chunk by chunk in a fixed order;
                                          the row gradient is added at the anchors

and, once all chunks of a sequence are done, `project_gradient` applies the Jacobian of the normalisation.

When the weight of each term is known beforehand (any mean or sum is), forward and backward are this one pass: three
products and nothing recomputed. Without gradient it stops after the row pass. Given arbitrary upstream gradients, the
same pass runs again with them as weights: four products.

Raw embeddings enter the products; norms are applied to the products' results and to `X` (see `rows_torch`). Each row
of a chunk is a different token, so adding the row gradient at the anchors has one writer per address. Nothing is
atomic and nothing depends on timing: two runs give the same bits.

Workspace per row of a chunk: `4 n` bytes of similarity, `2 n` more for a narrower `X`, `8 D` for the anchor and its
gradient. Where the input is narrower than float32, one sequence's gradient is accumulated in float32 beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .chunk import (
    FrameStatistics,
    FrameUpstream,
    FusedPass,
    MatchRuns,
    MatchTerms,
    Problem,
    RowChunk,
    RowOperations,
    TermWeights,
)
from .index import MatchIndex, RowIndex, SequenceSpan
from .products import Products


@dataclass(frozen=True)
class ChunkSpan:
    """The part of the batch that a chunk covers."""

    layers: slice
    sequence: SequenceSpan
    rows: slice  # of the batch
    boost: Tensor | None  # float32 [G], factor of upstream gradients; see `fp16_boost`

    def upstream(self, values: Tensor) -> Tensor:
        """These layers of weights or upstream gradients [L, ...], times their boost."""
        values = values[self.layers]
        return values if self.boost is None else values * self.boost.view(-1, *[1] * (values.dim() - 1))


RowPass = Callable[[RowChunk, ChunkSpan, Tensor | None], None]  # the last one is X [G, R, n], written if not None


@dataclass(frozen=True, kw_only=True)
class ChunkedEngine:
    """Runs the strategy with one set of row operations (`rows_cpp`, `rows_triton` or `rows_torch`)."""

    operations: RowOperations
    workspace_bytes: int
    fused_pass: FusedPass | None = None  # the row pass of the loss in one launch, where it fits

    def terms_and_gradients(
        self,
        problem: Problem,
        index: MatchIndex,
        weights: TermWeights | None,  # [L, M]; with them, gradients are computed
        terms: MatchTerms,  # [L, M], written
        negatives: str,  # "sequence" | "frame"
        eps: float,
        gradient: Tensor | None,  # [L, N, D], written
        needs_temperature_gradient: bool,
    ) -> Tensor | None:
        """Both terms of every match; with `weights`, the gradients of `sum weights * terms`.

        Returns the gradient of the temperature, or None where it is not wanted.
        """

        def row_pass(chunk: RowChunk, span: ChunkSpan, x: Tensor | None) -> None:
            runs = MatchRuns.of(index, span.rows, first_token=span.sequence.tokens[0])
            chunk_weights = None if weights is None else TermWeights(*map(span.upstream, weights))
            chunk_terms = terms.of_layers(span.layers)
            if self.fused_pass is not None and self.fused_pass(
                chunk, runs, chunk_weights, chunk_terms, negatives, eps, x
            ):
                return
            statistics = self.operations.frame_statistics(chunk, runs, every_frame=negatives == "sequence")
            upstream = self.operations.loss_terms(chunk, statistics, runs, chunk_weights, chunk_terms, negatives, eps)
            if x is not None and upstream is not None:
                self.operations.similarity_gradient(chunk, statistics, upstream, runs, chunk_weights, x)

        return self._for_each_chunk(problem, row_pass, weights or (), gradient, needs_temperature_gradient)

    def frame_match(self, problem: Problem) -> FrameStatistics:
        """[L, A, P] statistics of every row over every frame of its sequence; `best` is a token of the batch."""
        layers, anchors = problem.embeddings.shape[0], problem.rows.row_token.shape[0]
        width, device = 0 if problem.values is None else problem.values.shape[1], problem.embeddings.device
        result = FrameStatistics.of_empty_frames(layers, anchors, problem.rows.longest, width, device)

        def row_pass(chunk: RowChunk, span: ChunkSpan, x: Tensor | None) -> None:
            statistics = self.operations.frame_statistics(chunk, None, every_frame=True)
            best = torch.where(statistics.best < 0, -1, statistics.best + span.sequence.tokens[0])
            for to, value in zip(result, statistics._replace(best=best), strict=True):
                to[span.layers, span.rows, : span.sequence.frame_count] = value

        self._for_each_chunk(problem, row_pass)
        return result

    def frame_match_gradient(
        self,
        problem: Problem,
        statistics: FrameStatistics,
        upstream: FrameUpstream,
        gradient: Tensor | None,  # [L, N, D], written
        needs_temperature_gradient: bool,
    ) -> Tensor | None:
        """The gradients of `sum upstream.lse * lse + sum upstream.expected * expected`."""

        def row_pass(chunk: RowChunk, span: ChunkSpan, x: Tensor | None) -> None:
            frames = slice(0, span.sequence.frame_count)
            chunk_statistics = (value[span.layers, span.rows, frames].contiguous() for value in statistics)
            chunk_upstream = (span.upstream(value)[:, span.rows, frames].contiguous() for value in upstream)
            if x is not None:
                self.operations.similarity_gradient(
                    chunk, FrameStatistics(*chunk_statistics), FrameUpstream(*chunk_upstream), None, None, x
                )

        return self._for_each_chunk(problem, row_pass, upstream, gradient, needs_temperature_gradient)

    def _for_each_chunk(
        self,
        problem: Problem,
        row_pass: RowPass,
        upstream: Sequence[Tensor] = (),  # each [L, ...]: weights of terms, or gradients of statistics
        gradient: Tensor | None = None,  # [L, N, D], written
        needs_temperature_gradient: bool = False,
    ) -> Tensor | None:
        """Visit each group of layers, sequence and chunk once, in a fixed order; return the temperature's gradient."""
        embeddings, rows, temperature = problem.embeddings, problem.rows, problem.temperature
        products, backward = Products.of(embeddings), gradient is not None or needs_temperature_gradient
        sizes = ChunkSizes.of(embeddings, rows, products, self.workspace_bytes)
        workspace = Workspace.allocate(sizes, embeddings, products, backward)
        radial: list[Tensor] = []  # of each chunk: sum_i e_i . (X E)_i, which is -tau dL/dtau
        for layers in sizes.layer_groups():
            norms = self.operations.inverse_norms(embeddings[layers])  # float32 [G, N]
            for sequence in rows.sequences():
                first, last = sequence.tokens
                tokens, scale = embeddings[layers, first:last], norms[:, first:last]  # [G, n, D], [G, n]
                frame_offsets = rows.frame_offsets[sequence.frames[0] : sequence.frames[1] + 1] - first
                boost = fp16_boost(products, [value[layers] for value in upstream], scale, temperature)
                total = None  # free the old accumulator before allocating the next
                total = accumulator(gradient, layers, sequence)  # float32 [G, n, D]
                if total is not None and sequence.row_count == 0:
                    total.zero_()

                for block in sizes.row_blocks(sequence, layer_count=tokens.shape[0]):
                    own = rows.row_token[block] - first  # [R]
                    anchors, similarity, x = workspace.shaped(tokens.shape[0], own.shape[0], last - first)
                    anchors.copy_(tokens[:, own])
                    products.similarity(anchors, tokens, out=similarity)
                    chunk = RowChunk(
                        similarity=similarity,
                        row_scale=scale[:, own],
                        token_scale=scale,
                        temperature=temperature,
                        own_token=own,
                        exclude_own=problem.exclude_own,
                        frame_offsets=frame_offsets,
                        values=None if problem.values is None else problem.values[first:last],
                        known=None if problem.known is None else problem.known[first:last],
                    )
                    row_pass(chunk, ChunkSpan(layers, sequence, block, boost), x if backward else None)
                    if not backward:
                        continue
                    row_gradient = workspace.row_gradient(tokens.shape[0], own.shape[0])
                    products.row_gradient(x, tokens, out=row_gradient)
                    if needs_temperature_gradient:
                        per_layer = (anchors * row_gradient).sum((1, 2))  # [G]
                        radial.append((per_layer if boost is None else per_layer / boost).sum())
                    if total is not None:
                        products.token_gradient(x, anchors, out=total, accumulate=block.start > sequence.rows[0])
                        total.index_add_(1, own, row_gradient)

                if gradient is not None and total is not None:
                    if boost is not None:
                        total.div_(boost[:, None, None])
                    self.operations.project_gradient(total, tokens, scale, out=gradient[layers, first:last])
        if not needs_temperature_gradient:
            return None
        return -torch.stack(radial).sum() / temperature if radial else torch.zeros((), device=embeddings.device)


def accumulator(gradient: Tensor | None, layers: slice, sequence: SequenceSpan) -> Tensor | None:
    """float32 [G, n, D] for the gradient of one sequence: the gradient itself where it is float32."""
    if gradient is None:
        return None
    out = gradient[layers, sequence.tokens[0] : sequence.tokens[1]]
    return out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device=out.device)


def fp16_boost(
    products: Products,
    upstream: list[Tensor],  # each [G, ...]
    inverse_norms: Tensor,  # float32 [G, n]
    temperature: Tensor,
) -> Tensor | None:
    """[G] powers of two that bring `X` into the range of float16; None where `X` is not float16.

    In a mean, `weight r_i r_k / tau` is about 1e-8 for embeddings a few thousand wide, below the smallest number that
    float16 has. Upstream gradients are multiplied by the boost, the results of the products divided by it.
    """
    if products.element != torch.float16 or not upstream or any(value.numel() == 0 for value in upstream):
        return None
    largest = torch.stack([value.abs().flatten(1).amax(1) for value in upstream]).amax(0)  # [G]
    size = largest * inverse_norms.median(dim=1).values.square() / temperature
    return size.clamp(1e-30, 1e30).log2().round().neg().exp2()


@dataclass(frozen=True, kw_only=True)
class ChunkSizes:
    """How many layers and rows go together, so that one chunk fits the workspace."""

    rows: RowIndex
    layers: int
    width: int  # D
    x_bytes: int  # of a number of `X`, where it does not share the memory of the similarities
    workspace_bytes: int
    group: int  # layers that go together

    @staticmethod
    def of(embeddings: Tensor, rows: RowIndex, products: Products, workspace_bytes: int) -> ChunkSizes:
        """On a GPU, layers that fit together go together: there, launches of small layers cost more than their work."""
        layers, _, width = embeddings.shape
        x_bytes = 0 if products.element == torch.float32 else 2
        sizes = ChunkSizes(
            rows=rows, layers=layers, width=width, x_bytes=x_bytes, workspace_bytes=workspace_bytes, group=1
        )
        if not embeddings.is_cuda:
            return sizes
        per_layer = max(
            span.row_count * sizes.bytes_per_row(span) + 4 * span.token_count * width for span in rows.sequences()
        )
        return replace(sizes, group=min(layers, max(1, workspace_bytes // max(1, per_layer))))

    def layer_groups(self) -> list[slice]:
        return [slice(start, min(start + self.group, self.layers)) for start in range(0, self.layers, self.group)]

    def row_blocks(self, sequence: SequenceSpan, layer_count: int) -> list[slice]:
        """The rows of a sequence in blocks of equal size, as few as the workspace allows."""
        start, end = sequence.rows
        fitting = max(1, self.workspace_bytes // (layer_count * self.bytes_per_row(sequence)))
        blocks = -(-(end - start) // fitting)
        size = -(-(end - start) // max(1, blocks))
        return [slice(at, min(at + size, end)) for at in range(start, end, max(1, size))]

    def bytes_per_row(self, sequence: SequenceSpan) -> int:
        return (4 + self.x_bytes) * sequence.token_count + 8 * self.width

    def largest(self) -> tuple[int, int]:
        """(similarities, rows) of the largest chunk, over all its layers."""
        cells = rows = 0
        for sequence in self.rows.sequences():
            for block in self.row_blocks(sequence, self.group)[:1]:
                count = self.group * (block.stop - block.start)
                cells, rows = max(cells, count * sequence.token_count), max(rows, count)
        return cells, rows


@dataclass(frozen=True)
class Workspace:
    """Flat buffers for the largest chunk, allocated once; each chunk views them in its own shape."""

    width: int
    anchors: Tensor
    similarity: Tensor
    x: Tensor  # `similarity` itself where the products take float32
    row_gradients: Tensor

    @staticmethod
    def allocate(sizes: ChunkSizes, like: Tensor, products: Products, backward: bool) -> Workspace:
        cells, rows = sizes.largest()
        similarity = like.new_empty(cells, dtype=torch.float32)
        own_x = backward and products.element != torch.float32
        return Workspace(
            width=sizes.width,
            anchors=like.new_empty(rows * sizes.width, dtype=products.element),
            similarity=similarity,
            x=like.new_empty(cells, dtype=products.element) if own_x else similarity,
            row_gradients=like.new_empty(rows * sizes.width if backward else 0, dtype=torch.float32),
        )

    def shaped(self, groups: int, rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """anchors [G, R, D], similarity [G, R, n] and X [G, R, n]."""
        return (
            self._view(self.anchors, groups, rows, self.width),
            self._view(self.similarity, groups, rows, tokens),
            self._view(self.x, groups, rows, tokens),
        )

    def row_gradient(self, groups: int, rows: int) -> Tensor:
        """float32 [G, R, D]."""
        return self._view(self.row_gradients, groups, rows, self.width)

    @staticmethod
    def _view(flat: Tensor, groups: int, rows: int, last: int) -> Tensor:
        return flat[: groups * rows * last].view(groups, rows, last)

"""The strategy of every fast backend: row blocks, library matrix products, fused row operations between them.

A gradient accumulator of width `D` does not fit on chip once `D` exceeds a few hundred. A kernel that accumulates in
memory instead needs atomics or locks, which are slow and not reproducible. So the similarity matrix is cut into blocks
that fit a workspace (`blocks` explains how), and each block passes once through

    anchors    = E[rows]                  gathered
    for each part of the block's rows:
        similarity = anchors K^T          library product, float32 result
        row pass                          frame_statistics, loss_terms: lse, expected values, arg-max, both loss terms;
                                          X = similarity_gradient, in place or in the narrower type of the products
    row gradient   = X K                  library product

Where one block holds all rows, the rest is done for one panel of tokens after the other:

    panel          = X^T anchors          library product, only of these columns of X
    token gradient = project_gradient     adds the row gradient of tokens that are anchors, and applies the Jacobian of
                                          the normalisation

There `X` is usually folded first (`fold_kernels`): what is between two anchors is added both ways. `X K` is then the
whole gradient of the anchors, and the panels are of the other tokens alone.

Many blocks accumulate instead, in a fixed order:

    total         += X^T anchors          library product
    total         += row gradient         add_rows, at the anchors; `project_gradient` adds those of the last block

and `project_gradient` applies the Jacobian once all blocks of a sequence are done. `K` holds the candidates: `keys`, or
the embeddings themselves. With keys, the gradients of anchors and keys stay apart and each gets its own Jacobian.

When the weight of each term is known beforehand (any mean or sum is), forward and backward are this one pass: three
products and nothing recomputed. Without gradient it stops after the row pass. Given arbitrary upstream gradients, the
same pass runs again with them as weights: four products.

Where a block has only some of the columns, it is visited twice: first for the statistics, which are merged from left to
right; then, with complete statistics, for the gradient, from similarities that are computed again.

**Duals.** Where embeddings `x` stand for longer vectors `e = W x`, their inner products are `x_i . G x_k`, `G = W^T W`.
With `x'_k = G x_k`, the dual of `x_k`, every step stays as it is but for three operands: similarities are products of
anchors and duals, norms are `sqrt(x . x')`, and the Jacobian takes the inner product with the dual. The gradient
products combine embeddings, not duals, because the gradient of `e_i` is a combination of the `e_k`: its coefficients
combine the `x_k` into a `c_i` with `dL/de_i = W c_i`. These `c` are the result; `gasp_fast.loss.metric` makes gradients
of `x` and `G` from them. Embeddings and duals must be raw, hence not float16.

Raw embeddings enter the products; norms are applied to the products' results and to `X` (see `rows_torch`). float16 is
the exception: `X` would leave its range. There the products take normalised embeddings, and `boost` is a power of two
that brings `X` near 1. Each row is a different token, so adding the row gradient at the anchors has one writer per
address. Nothing is atomic and nothing depends on timing: two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import replay
from .block_memory import Buffers, Gradients, Part, piece, slices
from .blocks import Blocks, blocks_for
from .chunk import (
    ChunkMatches,
    FrameStatistics,
    FrameUpstream,
    MatchTerms,
    Problem,
    RowChunk,
    RowOperations,
    TermDefinition,
    TermWeights,
)
from .fp16_scales import fp16_scale
from .index import MatchIndex, SequenceSpan
from .products import Products
from .replay import CallTensors, Recording
from .row_block import LayerGroup

ALIGNED = 64  # bytes: kernels suppose at most so much of where their arguments begin


class RowPass(Protocol):
    """What is computed from the similarities of some rows."""

    def matches(self, part: Part) -> ChunkMatches | None: ...

    def statistics(self, chunk: RowChunk, part: Part) -> FrameStatistics:
        """The statistics of these rows, merged with `part.statistics`, those over earlier columns."""

    def upstream(self, part: Part, statistics: FrameStatistics) -> FrameUpstream | None:
        """Called once with the statistics over all columns; their gradients, if gradients are computed."""


@dataclass
class LossPass:
    """Writes both terms of every match; with `weights`, computes the gradients of `sum weights * terms`."""

    operations: RowOperations
    index: MatchIndex
    definition: TermDefinition
    weights: TermWeights | None  # [L, M]
    terms: MatchTerms  # [L, M]
    positive: Tensor  # float32 [L, M], scratch: a group of layers uses the beginning
    pull: Tensor | None  # float32 [L, M], scratch
    of_layers: tuple[slice | None, TermWeights | None, MatchTerms | None] = None, None, None  # see `_of_layers`

    def matches(self, part: Part) -> ChunkMatches:
        first = slice(0, part.layers.stop - part.layers.start)
        pull = None if self.pull is None else piece(self.pull, 0, first)
        return ChunkMatches.of(self.index, part.rows, piece(self.positive, 0, first), pull, self.definition)

    def statistics(self, chunk: RowChunk, part: Part) -> FrameStatistics:
        return self.operations.frame_statistics(chunk, part.matches, part.statistics, part.memory)

    def upstream(self, part: Part, statistics: FrameStatistics) -> FrameUpstream | None:
        assert part.matches is not None
        weights, terms = self._of_layers(part)
        return self.operations.loss_terms(statistics, part.matches, weights, terms, part.memory)

    def _of_layers(self, part: Part) -> tuple[TermWeights | None, MatchTerms]:
        """Weights, times their boost, and terms of the layers of `part`; views are made once for all of its blocks."""
        layers, weights, terms = self.of_layers
        if layers is not part.layers or terms is None:
            weights, terms = self.weights, self.terms
            every_layer = part.layers.stop - part.layers.start == terms.corr.shape[0]
            if weights is not None and (part.boost is not None or not every_layer):
                weights = TermWeights(*map(part.boosted, weights))
            if not every_layer:
                terms = terms.of_layers(part.layers)
            self.of_layers = part.layers, weights, terms
        return weights, terms


@dataclass(frozen=True)
class StatisticsPass:
    """Writes the statistics of every row, [L, A, P]."""

    operations: RowOperations
    result: FrameStatistics

    def matches(self, part: Part) -> None:
        return None

    def statistics(self, chunk: RowChunk, part: Part) -> FrameStatistics:
        return self.operations.frame_statistics(chunk, None, part.statistics)

    def upstream(self, part: Part, statistics: FrameStatistics) -> None:
        for to, value in zip(self.result[:5], statistics[:5], strict=True):
            to[part.layers, part.rows, : part.frames] = value


@dataclass(frozen=True)
class StatisticsGradientPass:
    """Computes the gradient of a weighted sum of statistics [L, A, P] that an earlier pass computed."""

    known: FrameStatistics
    gradients: FrameUpstream

    def matches(self, part: Part) -> None:
        return None

    def statistics(self, chunk: RowChunk, part: Part) -> FrameStatistics:
        values = (value[part.layers, part.rows, : part.frames] for value in self.known[:5])
        return FrameStatistics.of(value.contiguous() for value in values)

    def upstream(self, part: Part, statistics: FrameStatistics) -> FrameUpstream:
        values = (part.boosted(value)[:, part.rows, : part.frames] for value in self.gradients)
        return FrameUpstream(*(value.contiguous() for value in values))


class Forward(Protocol):
    """A pass without gradient that stores no similarities: `product_statistics`."""

    def serves(self, problem: Problem) -> bool: ...

    def match_terms(
        self, problem: Problem, index: MatchIndex, terms: MatchTerms, definition: TermDefinition
    ) -> None: ...

    def frame_match(self, problem: Problem) -> FrameStatistics: ...


@dataclass(frozen=True, kw_only=True)
class ChunkedEngine:
    """Runs the strategy with one set of row operations (`rows_cpp`, `rows_triton` or `rows_torch`)."""

    operations: RowOperations
    workspace_bytes: int
    forward: Forward | None = None
    replays: bool = False  # whether the operations are launched, so that they can be recorded

    def terms_and_gradients(
        self,
        problem: Problem,
        index: MatchIndex,
        weights: TermWeights | None,  # [L, M]; with them, gradients are computed
        terms: MatchTerms,  # [L, M], written
        definition: TermDefinition,
        gradients: Gradients,
    ) -> Tensor | None:
        """Both terms of every match; with `weights`, the gradients of `sum weights * terms`.

        Returns the gradient of the temperature, or None where it is not needed.
        """
        if weights is None and self.forward is not None and self.streams(problem, self.forward):
            self.forward.match_terms(problem, index, terms, definition)
            return None
        positive = torch.empty_like(terms.corr)
        pull = None if weights is None else torch.empty_like(terms.corr)
        row_pass = LossPass(self.operations, index, definition, weights, terms, positive, pull)
        return self._for_each_block(problem, row_pass, weights or (), gradients)

    def frame_match(self, problem: Problem) -> FrameStatistics:
        """[L, A, P] statistics of every row over every frame of its sequence."""
        if self.forward is not None and self.streams(problem, self.forward):
            return self.forward.frame_match(problem)
        layers, anchors = problem.embeddings.shape[0], problem.rows.row_token.shape[0]
        width, device = 0 if problem.values is None else problem.values.shape[1], problem.embeddings.device
        result = FrameStatistics.of_empty_frames(layers, anchors, problem.rows.longest, width, device)
        self._for_each_block(problem, StatisticsPass(self.operations, result), (), Gradients())
        return result

    def frame_match_gradient(
        self, problem: Problem, statistics: FrameStatistics, upstream: FrameUpstream, gradients: Gradients
    ) -> Tensor | None:
        """The gradients of `sum upstream.lse * lse + sum upstream.expected * expected`."""
        return self._for_each_block(problem, StatisticsGradientPass(statistics, upstream), upstream, gradients)

    def streams(self, problem: Problem, forward: Forward) -> bool:
        """Whether a pass without gradient leaves the blocks: where these would cut columns, and merge statistics.

        With whole rows, a library product and a pass over its result were faster on an H100 (docs/kernels.md).
        """
        layers, _, width = problem.embeddings.shape
        products = Products.of(problem.embeddings)
        return (
            problem.duals is None
            and forward.serves(problem)
            and any(
                blocks_for(products.sizes(layers, span, width, False), self.workspace_bytes).columns < span.token_count
                for span in problem.rows.sequences
            )
        )

    def _for_each_block(
        self,
        problem: Problem,
        row_pass: RowPass,
        upstream: Sequence[Tensor],  # each [L, ...]: weights of terms, or gradients of statistics
        gradients: Gradients,
    ) -> Tensor | None:
        """Visit each sequence, group of layers and block once, in a fixed order; return the temperature's gradient."""
        radial: list[Tensor] = []  # of each block: sum_i e_i . (X K)_i, which is -tau dL/dtau; see `RowBlock.radial`
        if gradients.embeddings is not None and gradients.embeddings is not gradients.keys:
            gradients.embeddings.zero_()  # for tokens that are no anchors
        if gradients.scale is not None:
            norms = self.operations.inverse_norms(problem.keys)
            gradients.scale.copy_(fp16_scale(upstream, problem.temperature, norms))
        call = self._call_tensors(problem, row_pass, gradients)
        for sequence in problem.rows.sequences:
            if sequence.row_count > 0:
                self._visit_sequence(problem, sequence, row_pass, upstream, gradients, radial, call)
            elif gradients.keys is not None:
                gradients.keys[:, slice(*sequence.tokens)].zero_()
        if not gradients.temperature:
            return None
        zero = torch.zeros((), device=problem.embeddings.device)
        return -torch.stack(radial).sum() / problem.temperature if radial else zero

    def _visit_sequence(
        self,
        problem: Problem,
        sequence: SequenceSpan,
        row_pass: RowPass,
        upstream: Sequence[Tensor],
        gradients: Gradients,
        radial: list[Tensor],
        call: CallTensors | None,
    ) -> None:
        """All layers, in groups; with `call`, groups that repeat another one are started from its recording."""
        layers, products = problem.embeddings.shape[0], Products.of(problem.embeddings)
        foldable = gradients.keys is not None and gradients.keys is gradients.embeddings
        sizes = products.sizes(layers, sequence, problem.embeddings.shape[-1], gradients.any, foldable)
        blocks = blocks_for(sizes, self.workspace_bytes)
        again, recording = (False, None) if call is None else replay.take(call, (sequence.number, blocks))
        several = 2 * blocks.layers <= layers
        buffers: Buffers | None = None
        for group_layers in slices(0, layers, blocks.layers):
            whole = group_layers.stop - group_layers.start == min(layers, blocks.layers)
            if recording is not None and whole:
                recording.repeat(group_layers.start)
                continue
            begun = None
            if call is not None and recording is None and (again or several):
                begun = recording = Recording(call)
            with begun or nullcontext():
                buffers = buffers or Buffers.allocate(blocks, sizes, products, problem.embeddings)
                group = LayerGroup.of(
                    problem, group_layers, sequence, products, self.operations, upstream, gradients, blocks, buffers
                )
                for rows in slices(*sequence.rows, blocks.rows):
                    self._visit_block(group, rows, row_pass, blocks, buffers, radial)
                group.finish()
            del group  # its accumulator, before the next one is allocated
        if call is not None:
            replay.store(call, (sequence.number, blocks), recording)

    def _call_tensors(self, problem: Problem, row_pass: RowPass, gradients: Gradients) -> CallTensors | None:
        """The tensors of a call whose groups of layers can be repeated; None where one does not repeat another.

        Besides launches and products, that is where torch computes: fp16 is normalised and scaled, the gradient of the
        temperature is summed, anchors that are no candidates have a gradient of their own, strides are unusual.
        """
        embeddings, keys = problem.embeddings, problem.keys
        own_gradient = gradients.embeddings is not None and keys is not embeddings
        unusual = embeddings.stride(2) != 1 or embeddings.dtype == torch.float16
        if not self.replays or not isinstance(row_pass, LossPass) or own_gradient or unusual or gradients.temperature:
            return None
        weights = row_pass.weights or ()
        users = [embeddings] if keys is embeddings else [embeddings, keys]
        users += [tensor for tensor in (problem.duals, gradients.keys) if tensor is not None]
        scratch = [row_pass.positive] if row_pass.pull is None else [row_pass.positive, row_pass.pull]
        forms = [(t.dtype, t.shape, t.stride(), t.data_ptr() % ALIGNED) for t in users]
        kind = row_pass.definition, keys is embeddings, problem.duals is None, gradients.keys is None
        form = (*kind, *forms, *[weight.stride() for weight in weights])
        layered = [*users, *row_pass.terms, *weights]
        return CallTensors(row_pass.index, form, layered, [*scratch, problem.temperature])

    def _visit_block(
        self, group: LayerGroup, rows: slice, row_pass: RowPass, blocks: Blocks, buffers: Buffers, radial: list[Tensor]
    ) -> None:
        backward = group.gradients.any
        cuts = slices(0, group.sequence.token_count, blocks.columns)
        block = group.block(rows, blocks, buffers)
        for part in block.parts:
            part.matches = part.matches or row_pass.matches(part)

        if len(cuts) > 1:  # the statistics of whole rows come first
            for columns in cuts:
                for part in block.parts:
                    part.statistics = row_pass.statistics(block.chunk(part, columns), part)
            for part in block.parts:
                assert part.statistics is not None
                part.upstream = row_pass.upstream(part, part.statistics)
            if not backward:
                return

        for columns in cuts:
            x = block.x(columns) if backward else None
            for part in block.parts:
                chunk = block.chunk(part, columns)
                if len(cuts) == 1:
                    part.statistics = row_pass.statistics(chunk, part)
                    part.upstream = row_pass.upstream(part, part.statistics)
                if x is not None and part.statistics is not None and part.upstream is not None:
                    of_part = part.gradient(x, columns)
                    self.operations.similarity_gradient(chunk, part.statistics, part.upstream, part.matches, of_part)
            if x is not None:
                block.multiply(x, columns)
        if backward:
            block.finish(radial)
            if x is not None and blocks.panel:
                block.write_panels(x, blocks.panel, radial)

"""A block of anchor rows against the tokens of one sequence: its products, and where gradients go.

`chunked` explains the order of the steps. Nothing here launches more than it must: sizes are numbers of the host, and a
tensor that is needed whole is not sliced, because each view costs the host about a microsecond. For the same reason
these dataclasses are not frozen: to create a frozen one takes several times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .block_memory import Buffers, Gradients, Part, piece, shaped, slices
from .blocks import Blocks
from .chunk import AddedRows, Problem, RowChunk, RowOperations
from .fp16_scales import fp16_boost
from .index import SequenceSpan
from .products import Products
from .replay import scratch


@dataclass
class LayerGroup:
    """One sequence in a group of layers, and the memory of its candidates' gradient."""

    problem: Problem
    layers: slice
    sequence: SequenceSpan
    products: Products
    operations: RowOperations
    gradients: Gradients
    raw: Tensor  # [G, n, D], the candidates
    tokens: Tensor  # [G, n, D], the same as the products take them: `raw`, or normalised
    duals: Tensor | None  # [G, n, D]; None: similarities are products with `tokens` themselves
    token_norms: Tensor  # float32 [G, n], inverse norms of `raw`
    token_scale: Tensor  # float32 [G, n], of `tokens`: `token_norms`, or ones where `tokens` are normalised
    row_norms: Tensor | None  # float32 [G, A], inverse norms of its anchors; None where these are no candidates
    gathered: bool  # whether the memory of a block has the anchors already
    boost: Tensor | None  # float32 [G]
    factor: Tensor | None  # float32 [G], by which gradients are multiplied: removes the boost, see `Gradients.scale`
    result: Tensor | None  # [G, n, D], of `gradients.keys`
    total: Tensor | None  # float32 [G, n, D], accumulator of many blocks; `result` itself where that is float32
    added: AddedRows | None = None  # row gradients of the last block, which are not in `total`

    @staticmethod
    def of(
        problem: Problem,
        layers: slice,
        sequence: SequenceSpan,
        products: Products,
        operations: RowOperations,
        upstream: Sequence[Tensor],
        gradients: Gradients,
        blocks: Blocks,
        buffers: Buffers,
    ) -> LayerGroup:
        span = slice(*sequence.tokens)
        raw = tokens = piece(piece(problem.keys, 0, layers), 1, span)
        duals = None if problem.duals is None else piece(piece(problem.duals, 0, layers), 1, span)
        row_norms, gathered = None, False
        if problem.keys is problem.embeddings:
            gathered = blocks.rows == sequence.row_count and not products.normalised
            first = slice(0, layers.stop - layers.start)
            token_norms, row_norms = piece(buffers.norms, 0, first), piece(buffers.row_norms, 0, first)
            anchors = piece(buffers.anchors, 0, first) if gathered else None
            own, row_of = piece(problem.rows.row_column, 0, slice(*sequence.rows)), problem.rows.rows_of(sequence)
            operations.norms_and_rows(raw, duals, own, row_of, token_norms, row_norms, anchors)
        else:
            token_norms = operations.inverse_norms(raw)
        scale = token_norms
        boost, factor = None, None if gradients.scale is None else gradients.scale[layers]
        if products.normalised:
            tokens, scale = normalised(raw, token_norms), torch.ones_like(token_norms)
            boost = fp16_boost([value[layers] for value in upstream], problem.temperature)
        if boost is not None:
            factor = 1 / boost if factor is None else factor / boost
        result = total = None
        if gradients.keys is not None:
            result = piece(piece(gradients.keys, 0, layers), 1, span)
            if blocks.panel == 0:
                total = result
                if result.dtype != torch.float32:
                    total = scratch(torch.empty_like(result, dtype=torch.float32))
        return LayerGroup(
            problem, layers, sequence, products, operations, gradients, raw, tokens, duals, token_norms, scale,
            row_norms, gathered, boost, factor, result, total,
        )  # fmt: skip

    def block(self, rows: slice, blocks: Blocks, buffers: Buffers) -> RowBlock:
        """A block of rows: anchors gathered, with their inverse norms."""
        problem, first_row = self.problem, self.sequence.rows[0]
        own = piece(problem.rows.row_column, 0, rows)  # [R]
        groups, _, width = self.tokens.shape
        count = rows.stop - rows.start
        anchors = shaped(buffers.anchors, groups, count, width)
        if self.row_norms is not None:
            if not self.gathered:
                self.operations.gather_rows(self.tokens, own, anchors)
            norms = piece(self.row_norms, 1, slice(rows.start - first_row, rows.stop - first_row))
        else:
            source, index = piece(problem.embeddings, 0, self.layers), piece(problem.rows.row_token, 0, rows)
            self.operations.gather_rows(source, index, anchors)
            norms = self.operations.inverse_norms(anchors)
            if self.products.normalised:
                anchors.copy_(normalised(anchors, norms))
        scale = torch.ones_like(norms) if self.products.normalised else norms
        whose = self.layers, self.sequence.frame_count, self.boost
        parts = [buffers.part(*whose, part, rows) for part in slices(rows.start, rows.stop, blocks.part)]
        row_gradient = None
        if buffers.row_gradient is not None:
            row_gradient = shaped(buffers.row_gradient, groups, count, width)
        offsets = problem.rows.frame_columns(self.sequence)
        rest = None if buffers.rest is None else piece(buffers.rest, 0, slice(0, groups))
        return RowBlock(self, rows, parts, own, offsets, anchors, norms, scale, buffers, row_gradient, rest)

    def finish(self) -> None:
        """Apply the Jacobian of the normalisation to the accumulated gradient."""
        if self.total is not None and self.result is not None:
            self.operations.project_gradient(
                self.total, self.raw, self.token_norms, self.result, self.products.normalised, self.factor, self.added,
                duals=self.duals,
            )  # fmt: skip


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
    rest: Tensor | None  # [G, R, n - R], see `Buffers`

    def chunk(self, part: Part, columns: slice) -> RowChunk:
        """Similarities of some rows with some columns."""
        group = self.group
        tokens = piece(group.tokens if group.duals is None else group.duals, 1, columns)  # [G, c, D]
        if part.anchors is None:
            part.anchors = piece(self.anchors, 1, part.local)
        row_scale, token_scale = piece(self.row_scale, 1, part.local), piece(group.token_scale, 1, columns)
        chunk = part.chunks.get(columns.start)
        if chunk is None:
            similarity = shaped(self.buffers.similarity, tokens.shape[0], part.anchors.shape[1], tokens.shape[1])
            chunk = part.chunks[columns.start] = self._new_chunk(part, columns, similarity, row_scale, token_scale)
        chunk.row_scale, chunk.token_scale = row_scale, token_scale
        group.products.similarity(part.anchors, tokens, chunk.similarity)
        return chunk

    def _new_chunk(
        self, part: Part, columns: slice, similarity: Tensor, row_scale: Tensor, token_scale: Tensor
    ) -> RowChunk:
        group, problem = self.group, self.group.problem
        first_token = group.sequence.tokens[0]
        span = slice(first_token + columns.start, first_token + columns.stop)
        return RowChunk(
            similarity=similarity,
            row_scale=row_scale,
            token_scale=token_scale,
            temperature=problem.temperature,
            row_token=piece(problem.rows.row_token, 0, part.rows),
            exclude_own=problem.exclude_own,
            first_token=span.start,
            frame_offsets=self.frame_columns,
            first_column=columns.start,
            values=None if problem.values is None else piece(problem.values, 0, span),
            known=None if problem.known is None else piece(problem.known, 0, span),
            multiple=_largest_power_of_two(problem.rows.frame_multiple | columns.start | columns.stop),
        )

    def x(self, columns: slice) -> Tensor:
        """`X` of these columns, [G, R, c], to be written."""
        groups, rows, _ = self.anchors.shape
        return self.buffers.x_of(self.group.result, groups, rows, columns.stop - columns.start)

    def multiply(self, x: Tensor, columns: slice) -> None:
        """The product of `X` and the candidates: the gradient of the rows. Adds that of the columns to `total`."""
        group, tokens = self.group, piece(self.group.tokens, 1, columns)
        assert self.row_gradient is not None
        if self.rest is not None:
            row_of = group.problem.rows.rows_of(group.sequence)
            group.operations.fold(x, self.own, row_of, self._others(), self.rest)
        group.products.row_gradient(x, tokens, self.row_gradient, columns.start > 0)
        if group.total is not None:
            later = self.rows.start > group.sequence.rows[0]
            group.products.token_gradient(x, self.anchors, piece(group.total, 1, columns), later)

    def finish(self, radial: list[Tensor]) -> None:
        """Use the gradient of the rows: for the temperature, for anchors that are no candidates, for `total`."""
        group, row_gradient = self.group, self.row_gradient
        assert row_gradient is not None
        gradients, problem = group.gradients, group.problem
        if gradients.temperature:
            anchors = self.anchors if group.duals is None else group.duals.index_select(1, self.own)
            radial.append(self.radial(anchors, row_gradient))
        if self.rest is not None:
            self._write_tokens(row_gradient, self.own)
        elif problem.keys is problem.embeddings:
            if self.rows.stop == group.sequence.rows[1]:  # the last block: `project_gradient` adds them
                group.added = self._added_rows(row_gradient)
            elif group.total is not None:
                group.operations.add_rows(row_gradient, self.own, group.total)
        elif gradients.embeddings is not None:
            tokens = problem.rows.row_token[self.rows]
            raw = problem.embeddings[group.layers].index_select(1, tokens)
            unit = group.products.normalised
            group.operations.project_gradient(row_gradient, raw, self.row_norms, row_gradient, unit, group.factor)
            gradients.embeddings[group.layers].index_copy_(1, tokens, row_gradient.to(gradients.embeddings.dtype))

    def radial(self, tokens: Tensor, gradient: Tensor) -> Tensor:
        """`sum_t e_t . u_t`, [G, m, D]: of the rows, `sum_ij X_ij x_ij`. With duals, these are the tokens.

        Where `X` is folded, the sum over all tokens counts each `X_ij` for its row and for its column, so it is halved.
        """
        per_layer = (tokens * gradient).sum((1, 2))  # [G]
        total = (per_layer if self.group.boost is None else per_layer / self.group.boost).sum()
        return total if self.rest is None else total / 2

    def _added_rows(self, row_gradient: Tensor) -> AddedRows:
        """The gradients of these rows, and the row of each token of the sequence."""
        group = self.group
        return AddedRows(
            row_gradient, group.problem.rows.rows_of(group.sequence), self.rows.start - group.sequence.rows[0]
        )

    def _others(self) -> Tensor:
        """int64 [n - R]: the columns that are no rows."""
        return self.group.problem.rows.other_columns(self.group.sequence)

    def _write_tokens(self, gradient: Tensor, tokens: Tensor) -> None:
        """The gradient of some tokens of the sequence, [G, m, D], [m]."""
        group = self.group
        assert group.result is not None
        group.operations.project_gradient(
            gradient, group.raw, group.token_norms, group.result, group.products.normalised, group.factor,
            tokens=tokens, duals=group.duals,
        )  # fmt: skip

    def write_panels(self, x: Tensor, size: int, radial: list[Tensor]) -> None:
        """The gradient of the candidates, `size` of them at a time; this block has all rows and columns.

        Where `X` is folded, that of the rows is written already.
        """
        group, result = self.group, self.group.result
        if result is None:
            return
        if self.rest is not None:
            self._write_rest(self.rest, size, radial)
            return
        for columns in slices(0, group.sequence.token_count, size):
            out = panel = piece(result, 1, columns)
            if self.buffers.panel is not None:
                panel = shaped(self.buffers.panel, *out.shape)
            group.products.token_gradient(piece(x, 2, columns), self.anchors, panel, False)
            added = group.added
            if added is not None:
                added = added._replace(of_token=piece(added.of_token, 0, columns))
            group.operations.project_gradient(
                panel, piece(group.raw, 1, columns), piece(group.token_norms, 1, columns), out,
                group.products.normalised, group.factor, added,
                duals=None if group.duals is None else piece(group.duals, 1, columns),
            )  # fmt: skip

    def _write_rest(self, rest: Tensor, size: int, radial: list[Tensor]) -> None:
        group, (groups, _, width) = self.group, self.anchors.shape
        assert self.buffers.panel is not None
        for columns in slices(0, rest.shape[2], size):
            panel = shaped(self.buffers.panel, groups, columns.stop - columns.start, width)
            tokens = self._others()[columns]
            group.products.token_gradient(piece(rest, 2, columns), self.anchors, panel, False)
            if group.gradients.temperature:
                compared = group.tokens if group.duals is None else group.duals
                radial.append(self.radial(compared.index_select(1, tokens), panel))
            self._write_tokens(panel, tokens)


def normalised(embeddings: Tensor, inverse_norm: Tensor) -> Tensor:
    """Unit embeddings in the same type: [G, n, D], [G, n]."""
    return (embeddings * inverse_norm[..., None]).to(embeddings.dtype)


def _largest_power_of_two(number: int) -> int:
    """The largest power of two that divides `number`, at most 16."""
    return min(16, number & -number) if number else 16

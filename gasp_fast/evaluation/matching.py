"""Finds each query point's most similar token in another frame, without storing a similarity matrix.

`frame_match` compares tokens of one table. Where queries and keys are different vectors (the q and k of an attention
layer), both go into one table: the queries that are needed follow the keys of their sequence as one additional frame.
They are the anchors; their match in that additional frame is not used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gasp_fast.loss.frame_matching import frame_match
from gasp_fast.loss.matches import Matches


class Matcher:
    """For each match of a batch: the predicted token in the target's frame, and its probability.

    Indices are prepared once on the CPU. A call for a layer does not synchronize with the GPU.
    """

    def __init__(self, matches: Matches, temperature: float, device: torch.device) -> None:
        offsets, starts = matches.frame_offsets, matches.sequence_offsets
        if starts is None:
            starts = torch.tensor([0, len(offsets) - 1])
        anchors, row = torch.unique(matches.anchor, return_inverse=True)  # [A], [M]
        frame = torch.searchsorted(offsets[1:].contiguous(), matches.target, right=True)  # [M]
        sequence = torch.searchsorted(starts[1:].contiguous(), frame, right=True)  # [M]
        self._temperature = temperature
        self._row = row.to(device)
        self._frame = (frame - starts[sequence]).to(device)
        self._one_table = anchors, offsets, starts
        self._joint = _JointTable(anchors, offsets, starts)
        self._anchors, self._order, self._token = (
            tensor.to(device) for tensor in (anchors, self._joint.order, self._joint.token)
        )

    def __call__(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys `[N, D]` -> predicted token of the batch, int64 `[M]`, and its probability, `[M]`.

        The probability is a softmax over the tokens of the target's frame.
        """
        if queries is keys:
            table, (anchors, offsets, starts) = keys, self._one_table
        else:
            table = torch.cat([keys, queries.index_select(0, self._anchors)]).index_select(0, self._order)
            anchors, offsets, starts = self._joint.anchors, self._joint.offsets, self._joint.starts
        match = frame_match(table, anchors, offsets, sequence_offsets=starts, temperature=self._temperature)
        best = match.best[0]  # [A, F]
        if queries is not keys:
            best = self._token[best.clamp(min=0)]
        return best[self._row, self._frame], match.confidence[0][self._row, self._frame]


class _JointTable:
    """Indices of a table in which the queries of each sequence follow its keys as one additional frame."""

    def __init__(self, anchors: Tensor, offsets: Tensor, starts: Tensor) -> None:
        tokens, sequences = int(offsets[-1]), len(starts) - 1
        ends = offsets[starts[1:]]  # [B], end of each sequence's tokens
        key_sequence = torch.searchsorted(ends, torch.arange(tokens), right=True)  # [N], sequence of each key
        query_sequence = torch.searchsorted(ends, anchors, right=True)  # [A]
        frame_sequence = torch.repeat_interleave(torch.arange(sequences), starts.diff())  # [F]
        # Stable sorts by sequence put the queries of each sequence behind its keys, and their frame behind its frames.
        # `order`: row of the table -> row of [keys, queries].
        self.order = torch.cat([key_sequence, query_sequence]).argsort(stable=True)
        self.anchors = (self.order >= tokens).nonzero()[:, 0]  # [A], rows of the table
        frames = torch.cat([frame_sequence, torch.arange(sequences)]).argsort(stable=True)
        sizes = torch.cat([offsets.diff(), query_sequence.bincount(minlength=sequences)])[frames]  # [F + B]
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        self.starts = starts + torch.arange(sequences + 1)  # one frame more in each sequence
        self.token = torch.where(self.order < tokens, self.order, -1)  # row of the table -> token of the batch


def similarities(queries: Tensor, keys: Tensor, token: int, temperature: float) -> Tensor:
    """Cosine similarity of one query token with every key, divided by the temperature: `[N]`.

    Computed by `frame_match` with every token as a frame of its own: the log-sum-exp over one token is its similarity.
    """
    table = torch.cat([keys, queries[token : token + 1]])
    each = torch.arange(len(table) + 1)
    match = frame_match(table, torch.tensor([len(keys)]), each, temperature=temperature)
    return match.lse[0, 0, : len(keys)]

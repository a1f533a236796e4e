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
        offsets, frames = matches.frame_offsets, matches.frame_offsets.shape[0] - 1
        starts = torch.tensor([0, frames]) if matches.sequence_offsets is None else matches.sequence_offsets
        self._temperature = temperature
        self._anchors, row = torch.unique(matches.anchor, return_inverse=True)  # [A], [M]
        frame = torch.searchsorted(offsets[1:].contiguous(), matches.target, right=True)  # [M]
        sequence = torch.searchsorted(starts[1:].contiguous(), frame, right=True)  # [M]
        self._offsets, self._starts = offsets, starts
        self._row = row.to(device)
        self._frame = (frame - starts[sequence]).to(device)
        self._joint = _JointTable(self._anchors, offsets, starts)
        self._anchor_rows, self._order, self._token = (
            tensor.to(device) for tensor in (self._anchors, self._joint.order, self._joint.token)
        )

    def __call__(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys `[N, D]` -> predicted token of the batch, int64 `[M]`, and its probability, `[M]`.

        The probability is a softmax over the tokens of the target's frame.
        """
        if queries is keys:
            match = frame_match(
                keys, self._anchors, self._offsets, sequence_offsets=self._starts, temperature=self._temperature
            )
            best = match.best[0]  # [A, F]
        else:
            table = torch.cat([keys, queries.index_select(0, self._anchor_rows)]).index_select(0, self._order)
            joint = self._joint
            match = frame_match(
                table, joint.anchors, joint.offsets, sequence_offsets=joint.starts, temperature=self._temperature
            )
            best = self._token[match.best[0].clamp(min=0)]
        return best[self._row, self._frame], match.confidence[0][self._row, self._frame]


class _JointTable:
    """Indices of a table in which the queries of each sequence follow its keys as one additional frame."""

    def __init__(self, anchors: Tensor, offsets: Tensor, starts: Tensor) -> None:
        tokens, sequences = int(offsets[-1]), len(starts) - 1
        ends = offsets[starts].tolist()  # [B + 1], token range of each sequence
        anchor_ends = torch.searchsorted(anchors, offsets[starts]).tolist()  # [B + 1], range of its anchors
        order: list[Tensor] = []
        joint_anchors: list[Tensor] = []
        sizes: list[int] = []
        length = 0
        for b in range(sequences):
            key = torch.arange(ends[b], ends[b + 1])
            query = torch.arange(anchor_ends[b], anchor_ends[b + 1])
            order += [key, tokens + query]
            joint_anchors.append(torch.arange(len(query)) + length + len(key))
            length += len(key) + len(query)
            sizes += [*torch.diff(offsets[starts[b] : starts[b + 1] + 1]).tolist(), len(query)]
        self.order = torch.cat(order)  # row of the table -> row of [keys, queries of the anchors]
        self.anchors = torch.cat(joint_anchors)  # [A], rows of the table
        self.offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
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

"""Each query point's best match in another frame, through `frame_match`: no similarity matrix is kept.

`frame_match` compares the tokens of one table. Where queries and keys are different vectors (the q and k of an
attention layer) both go into one table: behind the keys of each sequence stand the queries that are asked, as one
more frame of that sequence. They are the anchors; what they would find in their own frame is never looked at.

Knows embeddings and matches; must not know where embeddings come from or what right means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gasp_fast.loss.frame_matching import frame_match
from gasp_fast.loss.matches import Matches


class Matcher:
    """For the matches of one batch: where each one's anchor is found in the frame of its target, and how surely.

    Planned once on the CPU, then called for each layer; nothing waits for a GPU.
    """

    def __init__(self, matches: Matches, temperature: float, device: torch.device) -> None:
        offsets, frames = matches.frame_offsets, matches.frame_offsets.shape[0] - 1
        starts = torch.tensor([0, frames]) if matches.sequence_offsets is None else matches.sequence_offsets
        self._temperature = temperature
        self._anchors, row = torch.unique(matches.anchor, return_inverse=True)
        frame = torch.searchsorted(offsets[1:].contiguous(), matches.target, right=True)  # [M]
        sequence = torch.searchsorted(starts[1:].contiguous(), frame, right=True)
        self._offsets, self._starts = offsets, starts
        self._row = row.to(device)
        self._frame = (frame - starts[sequence]).to(device)
        self._joint = _JointTable(self._anchors, offsets, starts)
        self._asked, self._order, self._token = (
            tensor.to(device) for tensor in (self._anchors, self._joint.order, self._joint.token)
        )

    def __call__(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, D]` both -> the best token in the batch, int64 `[M]`, and its probability among its frame, `[M]`."""
        if queries is keys:
            found = frame_match(
                keys, self._anchors, self._offsets, sequence_offsets=self._starts, temperature=self._temperature
            )
            best = found.best[0]
        else:
            table = torch.cat([keys, queries.index_select(0, self._asked)]).index_select(0, self._order)
            joint = self._joint
            found = frame_match(
                table, joint.anchors, joint.offsets, sequence_offsets=joint.starts, temperature=self._temperature
            )
            best = self._token[found.best[0].clamp(min=0)]
        return best[self._row, self._frame], found.confidence[0][self._row, self._frame]


class _JointTable:
    """Where keys and asked queries stand when the queries of each sequence follow its keys as one more frame."""

    def __init__(self, asked: Tensor, offsets: Tensor, starts: Tensor) -> None:
        tokens, count = int(offsets[-1]), len(starts) - 1
        ends = offsets[starts].tolist()  # [B + 1], where each sequence's tokens begin and end
        asked_ends = torch.searchsorted(asked, offsets[starts]).tolist()  # [B + 1]
        order: list[Tensor] = []
        anchors: list[Tensor] = []
        sizes: list[int] = []
        placed = 0
        for b in range(count):
            key = torch.arange(ends[b], ends[b + 1])
            query = torch.arange(asked_ends[b], asked_ends[b + 1])
            order += [key, tokens + query]
            anchors.append(torch.arange(len(query)) + placed + len(key))
            placed += len(key) + len(query)
            sizes += [*torch.diff(offsets[starts[b] : starts[b + 1] + 1]).tolist(), len(query)]
        self.order = torch.cat(order)  # place in the joint table -> row of [keys, asked queries]
        self.anchors = torch.cat(anchors)  # [A]
        self.offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
        self.starts = starts + torch.arange(count + 1)  # a frame more in each sequence
        self.token = torch.where(self.order < tokens, self.order, -1)  # place -> token of the batch


def similarities(queries: Tensor, keys: Tensor, token: int, temperature: float) -> Tensor:
    """Cosine over temperature of one query token with every key, `[N]`.

    Through the same primitive: when each token is a frame of its own, the log-sum-exp over a frame is the similarity
    with its only token.
    """
    table = torch.cat([keys, queries[token : token + 1]])
    each = torch.arange(len(table) + 1)
    found = frame_match(table, torch.tensor([len(keys)]), each, temperature=temperature)
    return found.lse[0, 0, : len(keys)]

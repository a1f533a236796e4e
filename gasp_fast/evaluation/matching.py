"""Finds each query point's most similar token in another frame, without storing a similarity matrix."""

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
        self._anchors, self._offsets, self._starts = anchors, offsets, starts

    def __call__(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys `[N, D]` -> predicted token of the batch, int64 `[M]`, and its probability, `[M]`.

        The probability is a softmax over the tokens of the target's frame. Features that are not all finite have no
        most similar token: every prediction is -1, with probability NaN.
        """
        with torch.autocast(queries.device.type, enabled=False):  # in which a model that is being trained runs
            match = frame_match(
                queries, self._anchors, self._offsets, sequence_offsets=self._starts, temperature=self._temperature,
                keys=None if queries is keys else keys,
            )  # fmt: skip
        finite = queries.isfinite().all() & keys.isfinite().all()  # stays on the device
        best = torch.where(finite, match.best[0][self._row, self._frame], -1)
        return best, torch.where(finite, match.confidence[0][self._row, self._frame], torch.nan)


def similarities(queries: Tensor, keys: Tensor, token: int, temperature: float) -> Tensor:
    """Cosine similarity of one query token with every key, divided by the temperature: `[N]`.

    Computed by `frame_match` with every token as a frame of its own: the log-sum-exp over one token is its similarity.
    """
    each = torch.arange(len(keys) + 1)
    return frame_match(queries, torch.tensor([token]), each, temperature=temperature, keys=keys).lse[0, 0]

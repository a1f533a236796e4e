"""Finds each query point's most similar token in another frame, without storing a similarity matrix.

A correspondence can be measured in two directions. `forward`, as in the paper's Eq. 10: the query point of the first
frame gives the query, the tokens of a later frame the keys. The attention of these models is causal, so it never
computes these products. `causal`: the point in the later frame gives the query, the tokens of the first frame the keys.
The attention does compute those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gasp_fast.loss.frame_matching import frame_match
from gasp_fast.loss.matches import Matches

from .features import Kind

Direction = Literal["forward", "causal"]
Directions = Literal["forward", "causal", "both"]
_CAUSAL = "-causal"


def measured_names(kinds: Sequence[Kind], direction: Directions) -> dict[str, tuple[Kind, Direction]]:
    """What is measured, by its name in a report: `qk` is forward, `qk-causal` is causal."""
    chosen: tuple[Direction, ...] = ("forward", "causal") if direction == "both" else (direction,)
    return {f"{kind}{_CAUSAL if way == 'causal' else ''}": (kind, way) for kind in kinds for way in chosen}


def is_causal(name: str) -> bool:
    """Whether a measured name has the causal direction."""
    return name.endswith(_CAUSAL)


class Matcher:
    """For each match of a batch: the predicted token in the frame of the true one, and its probability.

    Indices are prepared once on the CPU. A call for a layer does not synchronize with the GPU.
    """

    def __init__(
        self, matches: Matches, temperature: float, device: torch.device, direction: Direction = "forward"
    ) -> None:
        offsets, starts = matches.frame_offsets, matches.sequence_offsets
        if starts is None:
            starts = torch.tensor([0, len(offsets) - 1])
        asked, true = matches.anchor, matches.target  # int64 [M] each
        if direction == "causal":
            asked, true = true, asked
        anchors, row = torch.unique(asked, return_inverse=True)  # [A], [M]
        frame = torch.searchsorted(offsets[1:].contiguous(), true, right=True)  # [M]
        sequence = torch.searchsorted(starts[1:].contiguous(), frame, right=True)  # [M]
        self._temperature = temperature
        self._row = row.to(device)
        self._frame = (frame - starts[sequence]).to(device)
        self._anchors, self._offsets, self._starts = anchors, offsets, starts
        self._asked = asked.to(device)
        # The matches of each frame that has any, and its range of tokens.
        self._by_frame = [
            ((frame == one).nonzero()[:, 0].to(device), *offsets[one : one + 2].tolist())
            for one in frame.unique().tolist()
        ]

    def __call__(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys `[N, D]` -> predicted token of the batch, int64 `[M]`, and its probability, `[M]`.

        Of head groups `[G, N, D]`, both are `[G, M]`. The probability is a softmax over the tokens of the frame.
        Features that are not all finite have no most similar token: every prediction is -1, with probability NaN.
        """
        with torch.autocast(queries.device.type, enabled=False):  # in which a model that is being trained runs
            match = frame_match(
                queries, self._anchors, self._offsets, sequence_offsets=self._starts, temperature=self._temperature,
                keys=None if queries is keys else keys,
            )  # fmt: skip
        finite = (queries.isfinite() & keys.isfinite()).flatten(-2).all(-1)[..., None]  # stays on the device
        best, confidence = (values[:, self._row, self._frame] for values in (match.best, match.confidence))
        if queries.dim() == 2:
            best, confidence = best[0], confidence[0]
        return torch.where(finite, best, -1), torch.where(finite, confidence, torch.nan)

    def attention(self, queries: Tensor, keys: Tensor, tokens: Tensor, head_dim: int) -> Tensor:
        """The probability `[M]` that attention gives to `tokens` `[M]` among those of their frame; NaN for token -1.

        A softmax of `q.k / sqrt(d)`. Where the features `[N, D]` are several heads side by side, of their mean.
        One frame's similarities exist at a time.
        """
        scale = head_dim**0.5 / queries.shape[-1]
        probability = torch.full(tokens.shape, torch.nan, device=tokens.device)
        for chosen, start, end in self._by_frame:
            logits = queries[self._asked[chosen]].float() @ keys[start:end].float().T * scale  # [m, frame's tokens]
            place = (tokens[chosen] - start).clamp(min=0)
            probability[chosen] = logits.softmax(1).gather(1, place[:, None])[:, 0]
        return torch.where(tokens < 0, torch.nan, probability)

"""`TokenIndex`: where the tokens of a batch are that a training step reads or replaces.

How many tokens a look-up finds is not known before it has run. On a GPU the host would wait for that number, and for
everything that was launched before it. So the look-ups are done where the batch is made, usually in a data worker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedRow:
    """The sequences of a packed row: several lie one after another in one row (`packing.py`)."""

    lengths: tuple[int, ...]
    offsets: Tensor  # int32 [sequences + 1], where they begin, and the end of the row


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenIndex:
    """Positions are flat indices into `B * S`. Moves and pins like a tensor, except for what the host reads."""

    visual: Tensor  # int64 [V], the visual tokens of all sequences
    predicting: Tensor  # int64 [K], the tokens that predict a labelled token: the ones before
    answers: Tensor  # int64 [K], the labels
    rotary: Tensor | None  # position ids of the decoder's rotary embedding; None: tokens are counted
    on_host: dict[str, Tensor]  # inputs whose numbers the model reads on the host
    row: PackedRow | None = None  # None: each row holds one sequence

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenIndex:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenIndex:
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenIndex:
        return replace(
            self,
            visual=change(self.visual),
            predicting=change(self.predicting),
            answers=change(self.answers),
            rotary=None if self.rotary is None else change(self.rotary),
            row=None if self.row is None else replace(self.row, offsets=change(self.row.offsets)),
        )

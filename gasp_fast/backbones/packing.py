"""Packing: the sequences of a batch lie one after another in one row, without padding.

Packed and padded, a sequence has the same states: its positions begin at 0, its tokens attend only to its own earlier
ones, and its first token is predicted from nothing. How the decoder's attention keeps the sequences apart depends on
its implementation:

    FlashAttention  its kernel for sequences of different lengths gets their offsets in the row
    SDPA            is called once for each sequence (`unmasked_attention.py`); a mask would cost the square of the row
    all others      get a mask [1, 1, T, T], block-diagonal and causal; eager attention stores that many numbers anyway
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .chat import IGNORE
from .token_index import PackedRow, TokenIndex
from .unmasked_attention import UNMASKED


def pack(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch `[B, S]` of a collator, with its `token_index`, as one row `[1, T]`. A single sequence is one already.

    To be called where the batch is made, on the CPU.
    """
    real: Tensor = batch["attention_mask"].bool()  # [B, S], without padding
    if len(real) == 1:
        return batch
    tokens = real.flatten().nonzero()[:, 0]  # [T]
    place = real.flatten().cumsum(0) - 1  # [B * S], in the row
    lengths = real.sum(1)  # [B]
    offsets = F.pad(lengths.cumsum(0), (1, 0))  # [B + 1]
    of_tokens = {
        name: value.flatten()[tokens][None]
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.shape == real.shape
    }
    of_tokens["labels"][:, offsets[:-1]] = IGNORE  # the token before belongs to another sequence
    index: TokenIndex = batch["token_index"]
    rotary = real.cumsum(1) - 1 if index.rotary is None else index.rotary  # [B, S], or [3, B, S]
    return {
        **batch,
        **of_tokens,
        "visual_positions": place[batch["visual_positions"]],
        "token_index": replace(
            index,
            visual=place[index.visual],
            predicting=place[index.predicting],
            rotary=rotary.flatten(-2)[..., None, tokens],
            row=PackedRow(tuple(lengths.tolist()), offsets.int()),
        ),
    }


def attention_arguments(row: PackedRow, attention: str, states: Tensor) -> dict[str, Any]:
    """Arguments with which a decoder, given `states [1, T, D]`, keeps the sequences of the row apart.

    `attention` is the implementation's name in transformers.
    """
    if attention == UNMASKED:
        return {"sequence_lengths": row.lengths}
    if attention.startswith("flash_attention"):
        longest = max(row.lengths)
        return {
            "cu_seq_lens_q": row.offsets,
            "cu_seq_lens_k": row.offsets,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    token = torch.arange(states.shape[1], device=states.device)
    sequence = torch.bucketize(token, row.offsets[1:], right=True)  # [T]
    attended = (sequence[:, None] == sequence) & (token[:, None] >= token)  # [T, T]
    mask = states.new_zeros(attended.shape).masked_fill(~attended, torch.finfo(states.dtype).min)
    return {"attention_mask": mask[None, None]}

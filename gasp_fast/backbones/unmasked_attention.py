"""SDPA attention without a mask for the decoder, in the right-padded batches and the packed rows of training.

Under causal attention no token sees the padding behind it, so a mask changes nothing that a loss reads. But
transformers reads the numbers of the mask, or without one those of the positions, to find out whether SDPA needs a
mask, and this makes the host wait for the GPU. It skips all of this for an attention function that is registered
without a function that makes its masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

UNMASKED = "sdpa_without_mask"


def use_unmasked_attention(model: Any) -> None:
    """Use SDPA without a mask in the decoder of a transformers model, if its attention is SDPA."""
    from transformers import AttentionInterface

    text = getattr(model.config, "text_config", None)
    if text is not None and text._attn_implementation == "sdpa":  # the field where transformers keeps the choice
        AttentionInterface.register(UNMASKED, attend)
        model.set_attn_implementation({"text_config": UNMASKED})


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_lengths: Sequence[int] = (),
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA of `query [B, heads, S, head_dim]`, in transformers' form; of each sequence of a packed row by itself."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not sequence_lengths:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    parts = zip(*(states.split(sequence_lengths, dim=2) for states in (query, key, value)), strict=True)
    attended = [sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in parts]  # of [1, S, heads, d]
    return torch.cat(attended, dim=1), None

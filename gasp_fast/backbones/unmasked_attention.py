"""SDPA attention without a mask for the decoder, in the right-padded batches of training.

Under causal attention no token sees the padding behind it, so a mask changes nothing that a loss reads. But
transformers reads the numbers of the mask, or without one those of the positions, to find out whether SDPA needs a
mask, and this makes the host wait for the GPU. It skips all of this for an attention function that is registered
without a function that makes its masks.
"""

from __future__ import annotations

from typing import Any

UNMASKED = "sdpa_without_mask"


def use_unmasked_attention(model: Any) -> None:
    """Use SDPA without a mask in the decoder of a transformers model, if its attention is SDPA."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    text = getattr(model.config, "text_config", None)
    if text is not None and text._attn_implementation == "sdpa":  # the field where transformers keeps the choice
        AttentionInterface.register(UNMASKED, sdpa_attention_forward)
        model.set_attn_implementation({"text_config": UNMASKED})

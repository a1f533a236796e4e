"""The base model of a run: how it is loaded and what makes it faster or smaller in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from .base import unwrap

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The vision-language model that is trained."""

    source: str  # folder of a saved model, or hub name
    dtype: Literal["bf16", "fp32"] = "bf16"  # of its computation; what is trained is always stored in fp32
    attention: Literal["auto", "flash_attention_3", "flash_attention_2", "sdpa", "eager"] = "auto"  # auto: best present
    frame_pixels: int | None = None  # most pixels of a frame after resizing, for models that keep the aspect ratio
    liger: bool = False  # Liger's fused layers for the base model

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("model.source is empty; name the folder of a saved model, or a hub name")


def choose_attention(config: ModelConfig, device: torch.device) -> str:
    """The attention of the model: the fastest that is there, or the one asked for, if it is there."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    there = {"flash_attention_3": is_flash_attn_3_available(), "flash_attention_2": is_flash_attn_2_available()}
    usable = device.type == "cuda" and config.dtype == "bf16"
    if config.attention == "auto":
        return next((name for name, found in there.items() if found and usable), "sdpa")
    if config.attention in there and not (there[config.attention] and usable):
        reason = "is not installed" if usable else f"needs a GPU and bf16, and this is {device.type}, {config.dtype}"
        raise ValueError(f"model.attention = {config.attention!r} {reason}; use model.attention=auto")
    return config.attention


def use_liger(model: Any) -> None:
    """Fused norms, rotary embeddings and MLPs. The loss stays ours: it only ever sees labelled tokens."""
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        raise ValueError("model.liger = true, but liger-kernel is not installed; pip install liger-kernel") from None
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"model.liger = true, but liger-kernel has nothing for {model.config.model_type}; use model.liger=false"
        )
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def use_checkpointing(model: Any, kind: str) -> None:
    if kind == "off":
        return
    reentrant = kind == "reentrant"
    inner = unwrap(model)
    if hasattr(inner, "activation_checkpointing_enable"):  # its name since transformers 5.20
        inner.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        # Reentrant checkpointing gives no gradient to a block whose input needs none, whatever is trained inside it.
        embeddings = inner.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))

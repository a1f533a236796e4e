"""The base model of a run: loading, choice of attention, fused layers, gradient checkpointing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .base import Backbone, load_backbone, unwrap

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The vision-language model that is trained."""

    source: str  # folder of a saved model, or hub name
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the computation; trained weights are always stored in fp32
    attention: Literal["auto", "flash_attention_3", "flash_attention_2", "sdpa", "eager"] = "auto"  # auto: the fastest
    frame_pixels: int | None = None  # most pixels of a frame after resizing, for models that keep the aspect ratio
    liger: bool = False  # Liger's fused layers for the base model

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("model.source is empty; name the folder of a saved model, or a hub name")


def load_base_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[Backbone, nn.Module]:
    """Load the backbone and its model in `dtype`, on the CPU. `device` is where the model will run."""
    backbone = load_backbone(config.source, config.frame_pixels)
    model = backbone.load_model(dtype, choose_attention(config, device))
    use_fast_modules(backbone, model, config)
    return backbone, model


def choose_attention(config: ModelConfig, device: torch.device) -> str:
    """The attention implementation, as transformers names it. auto: FlashAttention where it can run, else SDPA."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    installed = {"flash_attention_3": is_flash_attn_3_available(), "flash_attention_2": is_flash_attn_2_available()}
    usable = device.type == "cuda" and config.dtype == "bf16"
    if config.attention == "auto":
        return next((name for name, available in installed.items() if available and usable), "sdpa")
    if config.attention in installed and not (installed[config.attention] and usable):
        reason = "is not installed" if usable else f"needs a GPU and bf16, and this is {device.type}, {config.dtype}"
        raise ValueError(f"model.attention = {config.attention!r} {reason}; use model.attention=auto")
    return config.attention


def use_fast_modules(backbone: Backbone, model: nn.Module, config: ModelConfig) -> None:
    """Replace submodules by faster ones with the same weights. Call it after the model's weights are loaded."""
    backbone.replace_slow_modules(model)
    if config.liger:
        use_liger(model)


def use_liger(model: Any) -> None:
    """Liger's fused norms, rotary embeddings and MLPs, without its loss: ours skips tokens without a label."""
    try:
        import liger_kernel.transformers as liger
    except ImportError:
        raise ValueError("model.liger = true, but liger-kernel is not installed; pip install liger-kernel") from None
    apply = getattr(liger, f"apply_liger_kernel_to_{model.config.model_type}", None)
    if apply is None:
        raise ValueError(
            f"model.liger = true, but liger-kernel does not support {model.config.model_type}; use model.liger=false"
        )
    apply(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def use_checkpointing(model: Any, kind: str) -> None:
    """Gradient checkpointing of the layers: "off", "non_reentrant" or "reentrant"."""
    if kind == "off":
        return
    reentrant = kind == "reentrant"
    inner = unwrap(model)
    if hasattr(inner, "activation_checkpointing_enable"):  # its name since transformers 5.20
        inner.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        # Reentrant checkpointing gives no gradient to a block whose input needs none, even if the block is trained.
        embeddings = inner.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))

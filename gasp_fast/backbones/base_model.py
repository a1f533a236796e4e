"""The base model of a run: loading, choice of attention, fused layers, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from gasp_fast.config.limits import check_whole
from gasp_fast.files import one_line

from .attention_kernel import attention_kernel
from .base import Backbone, load_backbone, unwrap
from .frames import FRAMES_PER_GRID, FramesAs
from .frozen import exempt_frozen_parts
from .liger import choose_liger, use_liger

# Major compute capability -> the FlashAttention that is at least as fast there as SDPA.
FLASH_ATTENTION = {8: "flash_attention_2", 9: "flash_attention_3", 10: "flash_attention_4"}
LARGEST_FRAME = 1 << 25  # pixels; 7680 x 4320 is just below
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The vision-language model that is trained."""

    source: str  # folder of a saved model, or hub name
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the computation; trained weights are always stored in fp32
    # Attention kernel; auto: the newest FlashAttention that is installed, else sdpa.
    attention: Literal["auto", "flash_attention_4", "flash_attention_3", "flash_attention_2", "sdpa", "eager"] = "auto"
    frame_pixels: int | None = None  # most pixels of a frame after resizing, for models that keep the aspect ratio
    frames_as: FramesAs = "images"  # for Qwen2-VL, Qwen2.5-VL: images, or a video with a token grid a pair or frame
    liger: bool | Literal["auto"] = "auto"  # Liger's fused layers in the decoder; auto: on a GPU, where it is installed

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("model.source is empty; name the folder of a saved model, or a hub name")
        check_whole(self, ("frame_pixels",), "model.", most=LARGEST_FRAME)

    def grids_of(self, frames: int) -> int:
        """The number of token grids of so many frames."""
        return -(-frames // FRAMES_PER_GRID[self.frames_as])


def usable_device(name: str | None) -> str:
    """The device of that name, after a first use; by default the GPU, if there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).cpu()
    except Exception as error:  # of many types, by device
        raise ValueError(f"device = {name!r} cannot be used here: {one_line(error)}") from error
    return name


def load_base_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[Backbone, nn.Module]:
    """Load the backbone and its model in `dtype`, on the CPU. `device` is where the model will run."""
    backbone = load_backbone(config.source, config.frame_pixels, config.frames_as)
    model = backbone.load_model(dtype, choose_attention(config, device))
    use_fast_modules(backbone, model, config, device)
    return backbone, model


def choose_attention(config: ModelConfig, device: torch.device) -> str:
    """The attention implementation, as transformers names it.

    auto is SDPA, which is cuDNN's kernel on Hopper and Blackwell; where it is installed, FlashAttention 3 on Hopper and
    4 on Blackwell; and FlashAttention 2 on Ampere and Ada, where it is faster than SDPA.
    """
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

    installed = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_3": is_flash_attn_3_available,
        "flash_attention_4": is_flash_attn_4_available,
    }
    usable = device.type == "cuda" and config.dtype == "bf16"
    if config.attention == "auto":
        fast = FLASH_ATTENTION.get(torch.cuda.get_device_capability(device)[0]) if usable else None
        return fast if fast is not None and installed[fast]() else "sdpa"
    if config.attention in installed and not (usable and installed[config.attention]()):
        reason = "is not installed" if usable else f"needs a GPU and bf16, and this is {device.type}, {config.dtype}"
        raise ValueError(f"model.attention = {config.attention!r} {reason}; use model.attention=auto")
    return config.attention


def describe_layers(config: ModelConfig, backbone: Backbone, device: torch.device) -> str:
    """In words: which attention and which fused layers run."""
    attention = choose_attention(config, device)
    kernel = attention_kernel(attention, backbone.attention_shape, device, DTYPES[config.dtype])
    layers = "Liger's" if choose_liger(config.liger, backbone, device) else "transformers'"
    return f"{kernel} attention, {layers} norms and MLPs"


def use_fast_modules(
    backbone: Backbone, model: nn.Module, config: ModelConfig, device: torch.device | None = None
) -> None:
    """Replace submodules by faster ones with the same weights. Call it after the model's weights are loaded.

    `device` is where the model will run; None: where it is.
    """
    backbone.replace_slow_modules(model)
    if choose_liger(config.liger, backbone, device or next(model.parameters()).device):
        use_liger(backbone, model)


def use_checkpointing(model: Any, kind: str, kept: Iterable[Any] = ()) -> None:
    """Gradient checkpointing of the layers but `kept`, whose activations are kept until backward.

    Under `kind` "off" there is none, under "reentrant" it is torch's older one, else the one that is not reentrant.
    """
    if kind == "off":
        return
    reentrant = kind == "reentrant"
    inner = unwrap(model)
    if hasattr(inner, "activation_checkpointing_enable"):  # its name since transformers 5.20
        inner.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
    exempt_frozen_parts(inner, reentrant)
    for layer in kept:
        layer.gradient_checkpointing = False

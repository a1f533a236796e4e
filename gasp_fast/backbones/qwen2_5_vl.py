"""Qwen2.5-VL: its faster vision modules. `qwen_vl.py` has the rest."""

from __future__ import annotations

from torch import nn

from .base import register, unwrap
from .qwen_vl import QwenVL
from .vision_layers import use_fast_layers
from .window_attention import BatchedWindowAttention, batch_windows


@register
class Qwen2_5_VL(QwenVL):
    model_type = "qwen2_5_vl"

    def replace_slow_modules(self, model: nn.Module) -> None:
        super().replace_slow_modules(model)
        vision = unwrap(model).model.visual
        batch_windows(vision)
        use_fast_layers(vision)

    def reads_grids_on_host(self, model: nn.Module) -> bool:
        return isinstance(unwrap(model).model.visual.blocks[0].attn, BatchedWindowAttention)

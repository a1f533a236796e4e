"""Qwen2-VL: a video's positions in time count its grids, and all layers of its vision tower see whole frames."""

from __future__ import annotations

from .base import register
from .qwen_vl import QwenVL


@register
class Qwen2VL(QwenVL):
    model_type = "qwen2_vl"

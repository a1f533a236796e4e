"""Qwen3-VL with experts: the MLPs of its decoder differ from Qwen3-VL's, and nothing that is supervised or adapted.

With `train.mode: full` the routers are trained by the losses of the run alone: no term balances the load of experts.
"""

from __future__ import annotations

from .base import register
from .qwen3_vl import Qwen3VL


@register
class Qwen3VLMoe(Qwen3VL):
    model_type = "qwen3_vl_moe"
    llama_layers = False

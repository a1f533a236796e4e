"""LoRA adapters on the language model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .base import Backbone


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Adapters on q, k, v and o of the language model. Used where `train.mode` is lora."""

    rank: int = 128  # 512 for LLaVA-NeXT-Video
    alpha: int | None = None  # None: twice the rank
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank = {self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout = {self.dropout} must lie in 0 <= dropout < 1")


def add_adapters(backbone: Backbone, model: nn.Module, config: AdapterConfig) -> nn.Module:
    """Wrap `model` in peft's LoRA and freeze everything else. peft creates the adapters in fp32."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        target_modules=backbone.lora_targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)

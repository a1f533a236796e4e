"""Liger's fused RMS norms, rotary embedding and SwiGLU in the decoder.

The modules are replaced one by one, with their weights. Liger's own `apply_liger_kernel_to_...` do not serve here: that
of Qwen2.5-VL fails under transformers 5.23 and leaves out the rotary embedding under 5.17 (liger-kernel 0.8.5), and
LLaVA-NeXT-Video has none.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .base import Backbone

Setting = bool | Literal["auto"]
Family = Backbone | type[Backbone]


def choose_liger(setting: Setting, backbone: Family, device: torch.device) -> bool:
    """Whether to use Liger's layers. auto: on a GPU, if liger-kernel is installed and has layers for this model."""
    if not setting:
        return False
    obstacle = _obstacle(backbone, device)
    if setting == "auto" or obstacle is None:
        return obstacle is None
    raise ValueError(f"model.liger = true, but {obstacle}, or use model.liger=auto")


def _obstacle(backbone: Family, device: torch.device) -> str | None:
    """Why Liger's layers cannot be used; None if they can."""
    if device.type != "cuda":
        return f"liger-kernel needs a GPU, and this is {device.type}; train on one"
    if not backbone.llama_layers:
        return f"Liger has no layers for {backbone.model_type}; use model.liger=false"
    try:
        import liger_kernel.transformers  # noqa: F401
    except ImportError as error:
        missing = getattr(error, "name", None) in (None, "liger_kernel", "liger_kernel.transformers")
        return f"liger-kernel {'is not installed' if missing else f'needs {error.name}'}; pip install liger-kernel"
    return None


def use_liger(backbone: Backbone, model: nn.Module) -> None:
    """Replace norms, MLPs and the rotary embedding of the decoder."""
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb

    decoder = backbone.language_model(model)

    def norm(plain: Any) -> nn.Module:
        with torch.device("meta"):
            fused = LigerRMSNorm(len(plain.weight), eps=plain.variance_epsilon)
        fused.weight = plain.weight
        return fused

    for layer in decoder.layers:
        layer.input_layernorm, layer.post_attention_layernorm = map(
            norm, (layer.input_layernorm, layer.post_attention_layernorm)
        )
        attention = layer.self_attn
        if hasattr(attention, "q_norm"):
            attention.q_norm, attention.k_norm = norm(attention.q_norm), norm(attention.k_norm)
        with torch.device("meta"):
            mlp = LigerSwiGLUMLP(backbone.config.text_config)
        mlp.gate_proj, mlp.up_proj, mlp.down_proj = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
        layer.mlp = mlp
    decoder.norm = norm(decoder.norm)
    _use_rotary(sys.modules[type(decoder.layers[0].self_attn).__module__], liger_rotary_pos_emb)


def _use_rotary(modeling: Any, fused: Any) -> None:
    """Replace the function that the attention modules of this transformers module call.

    Liger rotates queries and keys in place. Where gradients are off, a hook may hold them (the evaluation does), so
    there, and on a CPU, the original is called.
    """
    plain = modeling.apply_rotary_pos_emb
    if hasattr(plain, "fused"):
        return

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        function = fused if q.is_cuda and torch.is_grad_enabled() else plain
        return function(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    rotary.fused = fused  # type: ignore[attr-defined]
    modeling.apply_rotary_pos_emb = rotary

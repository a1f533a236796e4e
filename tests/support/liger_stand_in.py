"""A stand-in for `liger_kernel.transformers`: its functions and classes in plain torch, saving what Liger's save."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return weight * (x * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, upstream = x * scale, gradients[0] * weight
        inner = scale * (upstream - normed * (upstream * normed).mean(-1, keepdim=True))
        return inner.to(x.dtype), (gradients[0] * normed).flatten(0, -2).sum(0).to(weight.dtype), None


class LigerRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.variance_epsilon)


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        sigmoid = gate.sigmoid()
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        return gradients[0] * up * slope, gradients[0] * F.silu(gate)


class LigerSwiGLUMLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_GatedProduct.apply(self.gate_proj(x), self.up_proj(x)))


def liger_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Any = None, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Like Liger's, it overwrites queries and keys."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    half = q.shape[-1] // 2
    for x in (q, k):
        x.copy_(x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin)
    return q, k


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in where `import liger_kernel.transformers` finds it. What it replaces is restored afterwards."""
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
    from transformers.models.qwen2_vl import modeling_qwen2_vl
    from transformers.models.qwen3_vl import modeling_qwen3_vl

    stand_in: Any = ModuleType("liger_kernel.transformers")
    stand_in.LigerRMSNorm, stand_in.LigerSwiGLUMLP = LigerRMSNorm, LigerSwiGLUMLP
    stand_in.liger_rotary_pos_emb = liger_rotary_pos_emb
    package: Any = ModuleType("liger_kernel")
    package.transformers = stand_in
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    for modeling in (modeling_llama, modeling_qwen2, modeling_qwen2_vl, modeling_qwen2_5_vl, modeling_qwen3_vl):
        monkeypatch.setattr(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb)

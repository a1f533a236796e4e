"""Layers of Qwen's vision tower without slow kernels and fp32 copies: norms, rotary embedding, gated MLP.

On a GPU, a frozen tower runs rotary embedding and SwiGLU in place, in one pass each (`kernels.inplace_kernels`).

Each module replaces transformers' own and holds the same parameters under the same names. So checkpoints, exports,
adapters and ZeRO-3, which gathers the weights of a module when it runs, see the original model.

The MLP of the 7B model is 3,420 wide. That is no multiple of 8, so cuBLAS cannot load 16 bytes at once and falls back
to kernels that are several times slower. `PaddedLinear` appends zeros to its weights each time it runs: a copy of 26 MB
a block, 1 % of the time of its products at 24 frames. The appended numbers of the gate and of the input are zero, so is
their product, and it meets zeros in the last matrix: the results are the same. No padding is stored or trained.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gasp_fast.kernels.inplace_kernels import rotate_in_place, swiglu_in_place, usable

MULTIPLE = 64  # of the width of the MLP: whole tiles of cuBLAS's kernels, and more than their alignment


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[S, H, d]` of `qkv [S, 3, H, d]`, queries and keys with rotary embedding.

    `cos` and `sin [S, d]` repeat their first half. Products and sums are fp32, rounded once. May overwrite `qkv`.
    """
    if usable(qkv):
        rotate_in_place(qkv, cos, sin)
        return qkv[:, 0], qkv[:, 1], qkv[:, 2]
    half = qkv.shape[-1] // 2
    cos, sin = (factor[:, None, None, :half].float() for factor in (cos, sin))
    first, second = qkv[:, :2].float().split(half, dim=-1)  # [S, 2, H, d / 2] each
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(qkv.dtype)
    return rotated[:, 0], rotated[:, 1], qkv[:, 2]


class FusedNorm(nn.Module):
    """RMS norm in one kernel that computes in fp32."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = original.weight
        self.variance_epsilon: float = original.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., D]` -> `[..., D]`."""
        shape = (x.shape[-1],)
        with torch.autocast(x.device.type, enabled=False):  # which would return fp32
            if self.weight.dtype == x.dtype:
                return F.rms_norm(x, shape, self.weight, self.variance_epsilon)
            return self.weight * F.rms_norm(x, shape, eps=self.variance_epsilon)  # trained weights: fp32


class PaddedLinear(nn.Module):
    """A linear layer of `outputs x inputs` weights, those that `original` does not have being zero."""

    def __init__(self, original: nn.Linear, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = original.weight, original.bias
        self.more = (0, inputs - original.in_features, 0, outputs - original.out_features)  # as `F.pad` takes it

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., inputs]` -> `[..., outputs]`."""
        bias = None if self.bias is None else F.pad(self.bias, self.more[2:])
        return F.linear(x, F.pad(self.weight, self.more), bias)


class GatedMLP(nn.Module):
    """Replaces `Qwen2_5_VLMLP`; between its layers it is a multiple of `MULTIPLE` wide."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        hidden, width = original.hidden_size, -(-original.intermediate_size // MULTIPLE) * MULTIPLE
        self.gate_proj = padded(original.gate_proj, hidden, width)
        self.up_proj = padded(original.up_proj, hidden, width)
        self.down_proj = padded(original.down_proj, width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """`x [S, D]` -> `[S, D]`."""
        gate, up = self.gate_proj(x), self.up_proj(x)  # [S, width] each
        if usable(gate, up):
            swiglu_in_place(gate, up)
            return self.down_proj(gate)
        return self.down_proj(F.silu(gate) * up)


def padded(linear: nn.Linear, inputs: int, outputs: int) -> nn.Module:
    if (linear.in_features, linear.out_features) == (inputs, outputs):
        return linear
    return PaddedLinear(linear, inputs, outputs)


def use_fast_layers(vision: Any) -> None:
    """Use the layers of this module in Qwen's vision tower."""
    for block in vision.blocks:
        block.norm1, block.norm2 = FusedNorm(block.norm1), FusedNorm(block.norm2)
        if vision.config.hidden_act == "silu":
            block.mlp = GatedMLP(block.mlp)
    vision.merger.ln_q = FusedNorm(vision.merger.ln_q)

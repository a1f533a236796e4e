"""The decoders of the geometry heads: pre-LN transformer blocks in which patches attend within their frame.

The patch at row r and column c has the position (r, c). Half of the dimensions of each attention head rotate by r, half
by c (2-D RoPE). In either half of n dimensions, the pair (i, i + n / 2) rotates by the angle r base^(-2 i / n), or c in
the place of r. A product of queries and keys then depends only on the differences of rows and of columns.

Modules have the names that the authors of G²VLM gave theirs, so that their weights fit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gasp_fast.supervision.precision import Compute, PrecisionLinear


class Turns(NamedTuple):
    """Cosine and sine of the angles by which each patch rotates its queries and keys."""

    cosine: Tensor  # [P, 2, d / 4], by row and by column; d: dimensions of an attention head
    sine: Tensor


def turns_of(rows: Tensor, columns: Tensor, dimensions: int, base: float) -> Turns:
    """Of patches at these rows and columns, [P] and [P]."""
    count = dimensions // 4
    frequency = base ** (-torch.arange(count, device=rows.device, dtype=torch.float32) / count)
    angles = torch.stack([rows, columns], -1)[..., None].float() * frequency  # [P, 2, d / 4]
    return Turns(angles.cos(), angles.sin())


def rotated(vectors: Tensor, turns: Turns) -> Tensor:
    """[..., P, d] -> [..., P, d] of the same type; computed in float32."""
    a, b = vectors.float().unflatten(-1, (2, 2, -1)).unbind(-2)  # [..., P, 2, d / 4]
    cosine, sine = turns
    turned = torch.stack([a * cosine - b * sine, b * cosine + a * sine], -2)
    return turned.flatten(-3).to(vectors.dtype)


def attended(query: Tensor, key: Tensor, value: Tensor, heads: int, turns: Turns) -> Tensor:
    """[N, P, width], twice [M, P, width] -> [N, P, width]. Each of the M frames is seen by N / M successive ones."""
    turned, key = (rotated(split(x, heads), turns) for x in (query, key))  # [N, heads, P, d], [M, heads, P, d]
    turned = turned.unflatten(0, (len(key), -1)).transpose(1, 2).flatten(2, 3)  # [M, heads, N / M P, d]
    seen = F.scaled_dot_product_attention(turned, key, split(value, heads))
    return seen.transpose(1, 2).reshape(query.shape)


def split(x: Tensor, heads: int) -> Tensor:
    """[N, P, width] -> [N, heads, P, d]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """The patches of each frame attend to each other."""

    def __init__(self, width: int, heads: int, compute: Compute) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = PrecisionLinear(width, 3 * width, compute)
        self.proj = PrecisionLinear(width, width, compute)

    def forward(self, x: Tensor, turns: Turns) -> Tensor:
        """[N, P, width] -> [N, P, width]."""
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.proj(attended(query, key, value, self.heads, turns))


class CrossAttention(nn.Module):
    """The patches of frames attend to those of other frames."""

    def __init__(self, width: int, heads: int, compute: Compute) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.proj = (PrecisionLinear(width, width, compute) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor, turns: Turns) -> Tensor:
        """[N, P, width], [M, P, width] -> [N, P, width]. Each context serves N / M successive frames."""
        return self.proj(attended(self.q_proj(x), self.k_proj(context), self.v_proj(context), self.heads, turns))


class MLP(nn.Module):
    def __init__(self, width: int, compute: Compute) -> None:
        super().__init__()
        self.fc1 = PrecisionLinear(width, 4 * width, compute)
        self.fc2 = PrecisionLinear(4 * width, width, compute)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention within the frame, MLP; each `x + f(norm(x))`."""

    def __init__(self, width: int, heads: int, compute: Compute) -> None:
        super().__init__()
        self.norm1, self.attn = norm(width), Attention(width, heads, compute)
        self.norm2, self.mlp = norm(width), MLP(width, compute)

    def forward(self, x: Tensor, turns: Turns) -> Tensor:
        """[B F, P, width] -> [B F, P, width]."""
        x = x + self.attn(self.norm1(x), turns)
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """Attention within the frame, attention to frame 0, MLP."""

    def __init__(self, width: int, heads: int, compute: Compute) -> None:
        super().__init__()
        self.norm1, self.attn = norm(width), Attention(width, heads, compute)
        self.norm2, self.norm_y, self.cross_attn = norm(width), norm(width), CrossAttention(width, heads, compute)
        self.norm3, self.mlp = norm(width), MLP(width, compute)

    def forward(self, x: Tensor, turns: Turns, first: Tensor) -> Tensor:
        """[B F, P, width], frame 0 before the blocks [B, P, width] -> [B F, P, width]."""
        x = x + self.attn(self.norm1(x), turns)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(first), turns)
        return x + self.mlp(self.norm3(x))


def norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)


class Decoder(nn.Module):
    """The blocks, and a linear map to the width of what is made of them.

    Where hidden states have another width than the blocks, a linear map comes before them. The authors have none:
    their hidden states are as wide as the blocks. Hidden states of 0 would then reach a norm as 0, where LayerNorm
    multiplies their gradient by 1,000, once: biases of the first block follow. The model's are not 0, not even where
    the map of DINO features is: they end in an RMSNorm (root mean square 0.94 there, in a new tiny model).
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        out: int,
        layers: int,
        heads: int,
        to_first: bool,
        compute: Compute,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.map = PrecisionLinear(hidden, width, compute) if hidden != width else nn.Identity()
        block = CrossBlock if to_first else Block
        self.blocks = nn.ModuleList(block(width, heads, compute) for _ in range(layers))
        self.linear_out = PrecisionLinear(width, out, "fp32")
        self.to_first, self.checkpointing = to_first, checkpointing

    def forward(self, hidden: Tensor, turns: Turns) -> Tensor:
        """[B, F, P, hidden] -> [B, F, P, out]."""
        x = self.map(hidden).float()
        frames, first = x.shape[:2], ((x[:, 0],) if self.to_first else ())
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = self._run(block, x, turns, *first)
        return self.linear_out(x).unflatten(0, frames)

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

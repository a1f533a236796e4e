"""The decoders of the geometry heads: pre-LN transformer blocks in which patches attend within their frame.

The patch at row r and column c has the position (r, c). Half of the dimensions of each attention head rotate by r, half
by c (2-D RoPE). In either half of n dimensions, the pair (i, i + n / 2) rotates by the angle r base^(-2 i / n), or c in
the place of r. A product of queries and keys then depends only on the differences of rows and of columns.
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


class Attention(nn.Module):
    """Queries of frames attend to the patches of other frames, or of the same ones."""

    def __init__(self, width: int, heads: int, compute: Compute) -> None:
        super().__init__()
        self.heads = heads
        self.query = PrecisionLinear(width, width, compute)
        self.key_value = PrecisionLinear(width, 2 * width, compute)
        self.out = PrecisionLinear(width, width, compute)

    def forward(self, x: Tensor, context: Tensor, turns: Turns) -> Tensor:
        """[N, P, width], [M, P, width] -> [N, P, width]. Each context serves N / M successive frames."""
        query = rotated(self._split(self.query(x)), turns)  # [N, heads, P, d]
        key, value = (self._split(part) for part in self.key_value(context).chunk(2, -1))  # [M, heads, P, d]
        query = query.unflatten(0, (len(context), -1)).transpose(1, 2).flatten(2, 3)  # [M, heads, N / M P, d]
        seen = F.scaled_dot_product_attention(query, rotated(key, turns), value)
        return self.out(seen.transpose(1, 2).reshape(x.shape))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Attention within the frame, attention to frame 0 if `to_first`, MLP; each `x + f(norm(x))`."""

    def __init__(self, width: int, heads: int, to_first: bool, compute: Compute) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, compute)
        if to_first:
            self.first_norm = nn.LayerNorm(width, eps=1e-6)
            self.first_attention = Attention(width, heads, compute)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.up = PrecisionLinear(width, 4 * width, compute)
        self.down = PrecisionLinear(4 * width, width, compute)
        self.to_first = to_first

    def forward(self, x: Tensor, first: Tensor, turns: Turns) -> Tensor:
        """[B F, P, width], frame 0 before the blocks [B, P, width] -> [B F, P, width]."""
        normed = self.norm(x)
        x = x + self.attention(normed, normed, turns)
        if self.to_first:
            x = x + self.first_attention(self.first_norm(x), self.first_norm(first), turns)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Decoder(nn.Module):
    """A linear map to the width of the blocks, and the blocks.

    The map has a bias, so that hidden states of 0, those of the zero-initialised map of DINO features, do not reach a
    norm as 0, where LayerNorm multiplies the gradient by 1,000. Measured there at width 256: the gradient of the hidden
    states has the norm 0.8, 300 without the map's bias, and it overflows without any bias.
    """

    def __init__(
        self, hidden: int, width: int, layers: int, heads: int, to_first: bool, compute: Compute, checkpointing: bool
    ) -> None:
        super().__init__()
        self.map = PrecisionLinear(hidden, width, compute)
        self.blocks = nn.ModuleList(Block(width, heads, to_first, compute) for _ in range(layers))
        self.checkpointing = checkpointing

    def forward(self, hidden: Tensor, turns: Turns) -> Tensor:
        """[B, F, P, hidden] -> [B, F, P, width]."""
        x = self.map(hidden).float()
        shape, first = x.shape, x[:, 0]
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = self._run(block, x, first, turns)
        return x.view(shape)

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

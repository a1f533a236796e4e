"""The transformer of G²VLM: each layer has two sets of weights, one for each kind of token, and one joint attention.

The semantic expert is the decoder of Qwen2-VL. The geometric expert begins as a copy of it and adds LayerScale, which
multiplies what attention and MLP add to a geometric token. The two streams stay apart: layers exchange queries, keys
and values only. Queries and keys of each head are normalised in both experts (`qk_norm`), then rotated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import ATTENTIONS, joint_attention, pattern_of, tail_attention
from .cache import Cache, KeysValues
from .tokens import Arrangement


@dataclass(frozen=True)
class ExpertsConfig:
    """What Qwen2-VL's configuration does not say."""

    attention: str = "global"  # which frames a frame sees: global (all) | block_causal | frame | mixed
    qk_norm: bool = True  # normalise queries and keys of each head; Qwen2-VL itself does not
    layer_scale: float = 0.01  # initial LayerScale of the geometric expert
    checkpointing: str = "full"  # layers that recompute their activations in backward: off, full, every:N (each Nth)

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention = {self.attention!r} is unknown; choose one of {', '.join(ATTENTIONS)}")
        if not re.fullmatch(r"off|full|every:[1-9]\d{0,5}", self.checkpointing):
            raise ValueError(f"checkpointing = {self.checkpointing!r} must be off, full, or every:N such as every:2")

    def recomputes(self, layer: int, layers: int) -> bool:
        """Whether this layer, of so many, keeps no activations."""
        if self.checkpointing.startswith("every:"):
            return (layers - layer) % int(self.checkpointing.removeprefix("every:")) == 0
        return self.checkpointing == "full"


class LayerScale(nn.Module):
    """Multiplies each channel by a learned factor."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(initial)))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.gamma


class Expert(nn.Module):
    """The weights of one layer for one kind of token. `sizes` is a Qwen2VLTextConfig."""

    def __init__(self, sizes: Any, qk_norm: bool, layer_scale: float | None = None) -> None:
        super().__init__()
        width, eps = sizes.hidden_size, sizes.rms_norm_eps
        self.heads = sizes.num_attention_heads
        self.key_heads = sizes.num_key_value_heads
        self.head_dim = width // self.heads
        self.input_norm = nn.RMSNorm(width, eps)
        self.qkv = nn.Linear(width, (self.heads + 2 * self.key_heads) * self.head_dim)  # rows of q, then k, then v
        self.q_norm = nn.RMSNorm(self.head_dim, eps) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width, bias=False)
        self.post_norm = nn.RMSNorm(width, eps)
        self.gate = nn.Linear(width, sizes.intermediate_size, bias=False)
        self.up = nn.Linear(width, sizes.intermediate_size, bias=False)
        self.down = nn.Linear(sizes.intermediate_size, width, bias=False)
        self.attention_scale = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.mlp_scale = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    @property
    def qkv_rows(self) -> list[int]:
        return [heads * self.head_dim for heads in (self.heads, self.key_heads, self.key_heads)]

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: [B, n, width] -> [B, n, heads, d], twice [B, n, key heads, d]."""
        heads = self.qkv(self.input_norm(hidden)).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split([self.heads, self.key_heads, self.key_heads], 2)
        return self.q_norm(query), self.k_norm(key), value

    def add(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """`hidden` after attention and MLP: twice [B, n, width] -> [B, n, width]."""
        hidden = hidden + self.attention_scale(self.out(attended))
        normed = self.post_norm(hidden)
        return hidden + self.mlp_scale(self.down(F.silu(self.gate(normed)) * self.up(normed)))


class Layer(nn.Module):
    """One layer of both experts."""

    def __init__(self, sizes: Any, config: ExpertsConfig, index: int) -> None:
        super().__init__()
        self.geometric = Expert(sizes, config.qk_norm, config.layer_scale)
        self.semantic = Expert(sizes, config.qk_norm)
        self.pattern = pattern_of(config.attention, index)

    def forward(
        self,
        semantic: Tensor,
        geometric: Tensor,
        cosine: Tensor,
        sine: Tensor,
        arrangement: Arrangement,
        memory: KeysValues | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[B, others, width], [B, patches, width], twice [B, 1, N, d / 2] -> both streams.

        Semantic tokens come first: where the layer enters, its first argument is what `supervision` reads. `memory`
        gets the keys and values of all tokens.
        """
        projected = zip(self.geometric.project(geometric), self.semantic.project(semantic), strict=True)
        query, key, value = (torch.cat(parts, 1).transpose(1, 2) for parts in projected)  # [B, heads, N, d]
        query, key = (rotate(states, cosine, sine).to(value.dtype) for states in (query, key))
        if memory is not None:
            memory.append(key, value)
        attended = joint_attention(query, key, value, arrangement, self.pattern)
        of_patches, of_others = attended.transpose(1, 2).flatten(2).split([geometric.shape[1], semantic.shape[1]], 1)
        return self.semantic.add(semantic, of_others), self.geometric.add(geometric, of_patches)

    @property
    def input_layernorm(self) -> nn.Module:
        """Of semantic tokens, under the name that it has in other decoders."""
        return self.semantic.input_norm

    def extend(self, tail: Tensor, cosine: Tensor, sine: Tensor, memory: KeysValues) -> Tensor:
        """Semantic tokens that see all those in `memory`, and are added to it: [B, n, width] -> [B, n, width]."""
        query, key, value = (states.transpose(1, 2) for states in self.semantic.project(tail))  # [B, heads, n, d]
        query, key = (rotate(states, cosine, sine).to(value.dtype) for states in (query, key))
        attended = tail_attention(query, *memory.append(key, value))
        return self.semantic.add(tail, attended.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """All layers and the final norm of each expert."""

    def __init__(self, sizes: Any, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = sizes.hidden_size // sizes.num_attention_heads
        self.theta: float = sizes.rope_parameters["rope_theta"]
        self.sections: Sequence[int] = sizes.rope_parameters["mrope_section"]
        self.layers = nn.ModuleList([Layer(sizes, config, index) for index in range(sizes.num_hidden_layers)])
        self.geometric_norm = nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.semantic_norm = nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)

    def of(self, kind: str) -> list[nn.Module]:
        """The modules of the "geometric" or the "semantic" expert."""
        return [*(getattr(layer, kind) for layer in self.layers), getattr(self, f"{kind}_norm")]

    def forward(
        self,
        geometric: Tensor,
        semantic: Tensor,
        positions: Tensor,
        arrangement: Arrangement,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[B, patches, width], [B, others, width], int64 [3, B, N] -> both streams, after the final norms.

        `cache` gets the keys and values of all tokens; gradients must be off then.
        """
        cosine, sine = rotations(positions, self.head_dim, self.theta, self.sections)
        for index, layer in enumerate(self.layers):
            arguments = semantic, geometric, cosine, sine, arrangement, None if cache is None else cache.layers[index]
            if torch.is_grad_enabled() and self.config.recomputes(index, len(self.layers)):
                semantic, geometric = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                semantic, geometric = layer(*arguments)
        return self.geometric_norm(geometric), self.semantic_norm(semantic)

    def extend(self, tail: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Semantic tokens after all those in the cache: [B, n, width], int64 [3, B, n] -> after the final norm."""
        cosine, sine = rotations(positions, self.head_dim, self.theta, self.sections)
        layers: Any = self.layers
        for layer, memory in zip(layers, cache.layers, strict=True):
            tail = layer.extend(tail, cosine, sine, memory)
        return self.semantic_norm(tail)


def rotations(positions: Tensor, head_dim: int, theta: float, sections: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of Qwen2-VL's rotary embedding: [3, B, N] -> twice float32 [B, 1, N, head_dim / 2].

    Frequencies fall from 1 to about 1 / theta. The first `sections[0]` turn with time, the next ones with row, the last
    with column.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None] * (1 / theta**exponent)  # [3, B, N, head_dim / 2]
    angle = torch.cat([part[axis] for axis, part in enumerate(angles.split(list(sections), -1))], -1)
    return angle.cos()[:, None], angle.sin()[:, None]


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn channel i and channel i + d / 2 of each head, as a pair: [B, heads, N, d]."""
    first, second = states.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)

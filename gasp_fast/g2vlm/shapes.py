"""Sizes of a G²VLM model, and the parameters and FLOPs that follow from them. Counts no heads: they are their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .attention import attended_pairs, pattern_of
from .experts import ExpertsConfig
from .model import G2VLM
from .tokens import Arrangement


@dataclass(frozen=True)
class Shapes:
    """The defaults are those of the paper: Qwen2-VL-2B and DINOv2-large with registers."""

    width: int = 1536
    layers: int = 28
    mlp: int = 8960
    heads: int = 12
    key_heads: int = 2
    head_dim: int = 128
    vocabulary: int = 151936
    encoder_width: int = 1024
    encoder_layers: int = 24
    encoder_mlp: int = 4096
    encoder_positions: int = 1369  # of patches, before they are interpolated
    registers: int = 4
    patch: int = 14
    vit_width: int = 1280
    vit_layers: int = 32
    vit_mlp: int = 5120
    qk_norm: bool = True
    attention: str = "global"

    @classmethod
    def of(cls, model: G2VLM) -> Shapes:
        return cls.of_configurations(model.qwen_config, model.encoder.config, model.config)

    @classmethod
    def of_configurations(cls, qwen: Any, dino: Any, experts: ExpertsConfig) -> Shapes:
        """From a Qwen2VLConfig and a Dinov2WithRegistersConfig."""
        text, vit = qwen.text_config, qwen.vision_config
        return cls(
            text.hidden_size, text.num_hidden_layers, text.intermediate_size, text.num_attention_heads,
            text.num_key_value_heads, text.hidden_size // text.num_attention_heads, text.vocab_size,
            dino.hidden_size, dino.num_hidden_layers, int(dino.hidden_size * dino.mlp_ratio),
            (dino.image_size // dino.patch_size) ** 2, dino.num_register_tokens, dino.patch_size,
            vit.embed_dim, vit.depth, int(vit.embed_dim * vit.mlp_ratio), experts.qk_norm, experts.attention,
        )  # fmt: skip

    @property
    def layer_products(self) -> int:
        """Weights of one layer of one expert that enter matrix products: one multiply-add each and token."""
        queries, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        return self.width * (2 * queries + 2 * keys) + 3 * self.width * self.mlp

    @property
    def encoder_products(self) -> int:
        """Of one layer of DINOv2."""
        return 4 * self.encoder_width**2 + 2 * self.encoder_width * self.encoder_mlp

    def parameters(self) -> dict[str, int]:
        """Of each part."""
        small = (self.heads + 2 * self.key_heads) * self.head_dim + 2 * self.width  # biases and norms of a layer
        small += 2 * self.head_dim * self.qk_norm
        expert = self.layers * (self.layer_products + small) + self.width
        return {
            "semantic": expert,
            "geometric": expert + self.layers * 2 * self.width,  # LayerScale
            "embedding": self.vocabulary * self.width,
            "lm_head": self.vocabulary * self.width,
            "patch_map": (self.encoder_width + 1) * self.width,
            "encoder": self._encoder_parameters(),
            "visual": self._vit_parameters(),
        }

    def forward_flops(self, arrangement: Arrangement) -> dict[str, float]:
        """Of one sequence, without the vision tower of the tail, heads and lm head; the latter's are
        2 * width * vocabulary for each labelled token."""
        pairs = sum(attended_pairs(arrangement, pattern_of(self.attention, layer)) for layer in range(self.layers))
        product = 2.0 * self.layers * self.layer_products
        patches = arrangement.rows * arrangement.columns
        tokens = patches + 1 + self.registers  # of a frame in DINOv2
        layer = 2.0 * tokens * self.encoder_products + 4.0 * tokens**2 * self.encoder_width
        return {
            "geometric": product * arrangement.patches,
            "semantic": product * (arrangement.total - arrangement.patches),
            "attention": 4.0 * self.heads * self.head_dim * pairs,
            "patch_map": 2.0 * arrangement.patches * self.encoder_width * self.width,
            "encoder": arrangement.frames
            * (self.encoder_layers * layer + 2.0 * patches * 3 * self.patch**2 * self.encoder_width),
        }

    def _encoder_parameters(self) -> int:
        width, mlp = self.encoder_width, self.encoder_mlp
        layer = self.encoder_products + 5 * width + mlp + 6 * width  # biases; two norms and two scales
        tokens = 1 + 1 + self.registers + 1 + self.encoder_positions  # CLS, mask, registers, positions
        return self.encoder_layers * layer + tokens * width + (3 * self.patch**2 + 1) * width + 2 * width

    def _vit_parameters(self) -> int:
        width, mlp, merged = self.vit_width, self.vit_mlp, 4 * self.vit_width
        layer = 4 * width**2 + 2 * width * mlp + 5 * width + mlp + 4 * width
        merger = 2 * width + merged * (merged + 1) + (merged + 1) * self.width
        return self.vit_layers * layer + 3 * 2 * self.patch**2 * width + merger

"""Sizes of a vision-language model that its FLOPs and memory follow from. Loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

WINDOW = 64  # patches of a window in Qwen's windowed vision layers: 112 x 112 pixels
PATCHES = 4  # patches of the vision tower for each visual token: all families merge two by two


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of the language model, the vision tower and its projector."""

    hidden: int
    layers: int
    query_heads: int
    key_heads: int
    head_dim: int
    intermediate: int  # of an MLP; where a layer has experts, of all that a token passes through
    vocabulary: int
    language_parameters: int  # embeddings and lm head included
    vision_hidden: int
    vision_layers: int
    vision_intermediate: int
    vision_gated: bool  # an MLP has three matrices, not two
    vision_full_layers: int  # with attention over the whole frame; the others attend within windows
    vision_parameters: int  # projector included
    patch: int  # pixels along a side
    frame_tokens: int | None = None  # visual tokens of a frame, where all frames have the same number

    @property
    def query_width(self) -> int:
        return self.query_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.key_heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Weights in the matrices of one decoder layer, of experts those that a token meets."""
        attention = 2 * self.query_width + 2 * self.key_width
        return self.hidden * (attention + 3 * self.intermediate)

    @property
    def vision_block_weights(self) -> int:
        return self.vision_hidden * (4 * self.vision_hidden + (2 + self.vision_gated) * self.vision_intermediate)

    def adapter_weights(self, rank: int) -> int:
        """Weights of one decoder layer's adapters: A and B of q, k, v and o."""
        return rank * 2 * (2 * self.hidden + self.query_width + self.key_width)


QWEN2_5_VL_7B = ModelShape(
    hidden=3584, layers=28, query_heads=28, key_heads=4, head_dim=128, intermediate=18944, vocabulary=152064,
    language_parameters=7_615_616_512, vision_hidden=1280, vision_layers=32, vision_intermediate=3420,
    vision_gated=True, vision_full_layers=4, vision_parameters=676_550_144, patch=14,
)  # fmt: skip
LLAVA_NEXT_VIDEO_7B = ModelShape(
    hidden=4096, layers=32, query_heads=32, key_heads=32, head_dim=128, intermediate=11008, vocabulary=32064,
    language_parameters=6_738_939_904, vision_hidden=1024, vision_layers=24, vision_intermediate=4096,
    vision_gated=False, vision_full_layers=24, vision_parameters=324_491_264, patch=14, frame_tokens=144,
)  # fmt: skip
QWEN2_VL_7B = replace(
    QWEN2_5_VL_7B, vision_intermediate=5120, vision_gated=False, vision_full_layers=32, vision_parameters=675_759_104
)
QWEN3_VL_8B = ModelShape(
    hidden=4096, layers=36, query_heads=32, key_heads=8, head_dim=128, intermediate=12288, vocabulary=151936,
    language_parameters=8_190_735_360, vision_hidden=1152, vision_layers=27, vision_intermediate=4304,
    vision_gated=False, vision_full_layers=27, vision_parameters=576_388_336, patch=16,
)  # fmt: skip
QWEN3_VL_30B_A3B = replace(
    QWEN3_VL_8B, hidden=2048, layers=48, key_heads=4, intermediate=8 * 768, language_parameters=30_532_122_624,
    vision_parameters=538_631_408,
)  # fmt: skip
LLAVA_ONEVISION_7B = ModelShape(
    hidden=3584, layers=28, query_heads=28, key_heads=4, head_dim=128, intermediate=18944, vocabulary=152128,
    language_parameters=7_616_075_264, vision_hidden=1152, vision_layers=26, vision_intermediate=4304,
    vision_gated=False, vision_full_layers=26, vision_parameters=414_732_320, patch=14, frame_tokens=196,
)  # fmt: skip
INTERNVL3_8B = ModelShape(
    hidden=3584, layers=28, query_heads=28, key_heads=4, head_dim=128, intermediate=18944, vocabulary=151674,
    language_parameters=7_612_820_992, vision_hidden=1024, vision_layers=24, vision_intermediate=4096,
    vision_gated=False, vision_full_layers=24, vision_parameters=331_552_768, patch=14, frame_tokens=256,
)  # fmt: skip
BY_NAME = {
    "Qwen2-VL-7B": QWEN2_VL_7B,
    "Qwen2.5-VL-7B": QWEN2_5_VL_7B,
    "Qwen3-VL-8B": QWEN3_VL_8B,
    "Qwen3-VL-30B-A3B": QWEN3_VL_30B_A3B,
    "LLaVA-NeXT-Video-7B": LLAVA_NEXT_VIDEO_7B,
    "LLaVA-OneVision-Qwen2-7B": LLAVA_ONEVISION_7B,
    "InternVL3-8B": INTERNVL3_8B,
}


def shape_from_source(source: str) -> ModelShape:
    """The shape of `source`: read from a model's folder, or by name for the models of this file."""
    if not Path(source).is_dir():
        for name, shape in BY_NAME.items():
            if name.lower() in source.lower():
                return shape
        raise OSError(
            f"model.source = {source!r} is no folder, and its shape is not known by name; give a model's folder, or "
            f"one of {', '.join(BY_NAME)}"
        )
    from gasp_fast import backbones  # noqa: F401 (makes torchvision importable where only its library is missing)
    from transformers import AutoConfig  # isort: skip

    return shape_from_config(AutoConfig.from_pretrained(source, trust_remote_code=False))


def shape_from_config(config: Any) -> ModelShape:
    """The shape of a model with this transformers configuration; counts parameters on the meta device."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return shape_from_model(AutoModelForImageTextToText.from_config(config))


def shape_from_model(model: Any) -> ModelShape:
    """The shape of a transformers model that is not sharded yet; its adapters do not count."""
    language = {id(p) for part in (model.model.language_model, model.lm_head) for p in part.parameters()}
    own = [p for name, p in model.named_parameters() if "lora_" not in name]  # a tied lm head comes once
    language_parameters = sum(p.numel() for p in own if id(p) in language)
    text, vision = model.config.text_config, model.config.vision_config
    layers = getattr(vision, "depth", None) or vision.num_hidden_layers
    width = getattr(vision, "embed_dim", None) or vision.hidden_size  # the second is the decoder's in Qwen2-VL
    patch, fixed = _side(vision.patch_size), getattr(vision, "image_size", None)
    full = getattr(vision, "fullatt_block_indexes", None)
    return ModelShape(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        query_heads=text.num_attention_heads,
        key_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        intermediate=_mlp_width(text),
        vocabulary=text.vocab_size,
        language_parameters=language_parameters,
        vision_hidden=width,
        vision_layers=layers,
        vision_intermediate=getattr(vision, "intermediate_size", None) or width * vision.mlp_ratio,
        vision_gated=full is not None,
        vision_full_layers=layers if full is None else len(full),
        vision_parameters=sum(p.numel() for p in own) - language_parameters,
        patch=patch,
        frame_tokens=None if fixed is None else (-(-(_side(fixed) // patch) // 2)) ** 2,
    )


def _mlp_width(text: Any) -> int:
    """Of the MLP of a decoder layer; where layers have experts, of all those of a token, in the mean over layers."""
    experts = getattr(text, "num_experts_per_tok", None)
    if not experts:
        return int(text.intermediate_size)
    dense, step = getattr(text, "mlp_only_layers", None) or (), getattr(text, "decoder_sparse_step", 1)
    of_experts = experts * (getattr(text, "moe_intermediate_size", None) or text.intermediate_size)
    widths = [
        text.intermediate_size if layer in dense or (layer + 1) % step else of_experts
        for layer in range(text.num_hidden_layers)
    ]
    return round(sum(widths) / len(widths))


def _side(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else size[0]

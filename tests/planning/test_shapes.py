"""The sizes of models are those of the real modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.families import SHIPPED
from support.planning import setup_of
from transformers import AutoConfig

from gasp_fast.planning.shapes import (
    BY_NAME,
    LLAVA_NEXT_VIDEO_7B,
    QWEN2_5_VL_7B,
    ModelShape,
    shape_from_config,
    shape_from_source,
)
from gasp_fast.planning.training_setup import ParameterCounts
from gasp_fast.supervision.heads import CorrespondenceHeads


def test_the_built_in_shapes_are_those_of_the_real_models() -> None:
    qwen = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config={
            "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "intermediate_size": 18944, "vocab_size": 152064,
        },
        vision_config={"hidden_size": 1280, "out_hidden_size": 3584},
        tie_word_embeddings=False,
    )  # fmt: skip
    assert shape_from_config(qwen) == QWEN2_5_VL_7B
    llava = AutoConfig.for_model(
        "llava_next_video",
        text_config={
            "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32064,
        },
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
        },
    )  # fmt: skip
    assert shape_from_config(llava) == LLAVA_NEXT_VIDEO_7B


QWEN_7B = {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "intermediate_size": 18944,
}  # fmt: skip
QWEN2_7B = {"model_type": "qwen2", **QWEN_7B}
QWEN3_8B = {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936,
}  # fmt: skip
QWEN3_30B_A3B = {
    "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "vocab_size": 151936,
}  # fmt: skip
REAL = {  # model_type, language model and vision tower, as far as they differ from transformers' defaults; billions
    "Qwen2-VL-7B": ("qwen2_vl", {**QWEN_7B, "vocab_size": 152064}, {"hidden_size": 3584}, 8.29),
    "Qwen3-VL-8B": ("qwen3_vl", QWEN3_8B, {"out_hidden_size": 4096}, 8.77),
    "Qwen3-VL-30B-A3B": ("qwen3_vl_moe", QWEN3_30B_A3B, {"out_hidden_size": 2048}, 31.07),
    "LLaVA-OneVision-Qwen2-7B": ("llava_onevision", {**QWEN2_7B, "vocab_size": 152128}, None, 8.03),
    "InternVL3-8B": ("internvl", {**QWEN2_7B, "vocab_size": 151674}, {"attention_bias": True}, 7.94),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_the_shapes_known_by_name_are_those_of_the_real_models(name: str) -> None:
    model_type, text, vision, billions = REAL[name]
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, tie_word_embeddings=False)
    shape = shape_from_config(config)
    assert shape == BY_NAME[name] == shape_from_source(f"someone/{name}-Instruct")
    assert round((shape.language_parameters + shape.vision_parameters) / 1e9, 2) == billions  # as the hub says


def test_experts_count_as_far_as_a_token_passes_through_them() -> None:
    """Of 128 experts of 768 in each layer a token meets 8: 3 of 30 billion weights, as in the model's name."""
    shape = BY_NAME["Qwen3-VL-30B-A3B"]
    active = shape.layers * shape.layer_weights + 2 * shape.vocabulary * shape.hidden
    assert shape.intermediate == 8 * 768 and 3.2e9 < active < 3.4e9
    text = {**QWEN3_30B_A3B, "num_hidden_layers": 4, "mlp_only_layers": [0], "num_experts": 8}
    config = AutoConfig.for_model("qwen3_vl_moe", text_config={**text, "intermediate_size": 10_240})
    assert shape_from_config(config).intermediate == (10_240 + 3 * 8 * 768) / 4


@pytest.mark.parametrize("small", SHIPPED, indirect=True)
def test_parameters_are_those_that_are_really_trained(small: tuple[Any, ModelShape]) -> None:
    backbone, shape = small
    model: Any = backbone.load_model(torch.float32)
    count = setup_of("lora.rank=5", "heads.layers=2-4", shape=shape).parameters
    assert count.frozen == sum(p.numel() for p in model.parameters())
    heads = CorrespondenceHeads.from_query_projections({n: backbone.query_projection(model, n) for n in (1, 2, 3)})
    assert count.heads == sum(p.numel() for p in heads.parameters())
    adapted = get_peft_model(model, LoraConfig(r=5, target_modules=backbone.lora_targets))
    assert count.adapters == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    full = setup_of("train.mode=full", shape=shape).parameters
    assert (full.frozen, full.model, full.adapters) == (0, count.frozen, 0)


def test_parameters_of_the_7b_recipe_by_hand() -> None:
    # q and o: 3584 -> 3584; k and v: 3584 -> 512. Heads 3584 -> 1792 -> 3584 with biases.
    adapters = 28 * 128 * (2 * (3584 + 3584) + 2 * (3584 + 512))
    heads = 28 * (2 * 3584 * 1792 + 1792 + 3584)
    assert (adapters, heads) == (80_740_352, 359_812_096)
    assert setup_of().parameters == ParameterCounts(frozen=8_292_166_656, model=0, adapters=adapters, heads=heads)

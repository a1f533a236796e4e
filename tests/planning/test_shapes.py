"""The sizes of models are those of the real modules."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from support.planning import setup_of

from gasp_fast.planning.shapes import LLAVA_NEXT_VIDEO_7B, QWEN2_5_VL_7B, ModelShape, shape_from_config
from gasp_fast.planning.training_setup import ParameterCounts
from gasp_fast.supervision.heads import CorrespondenceHeads


def test_the_built_in_shapes_are_those_of_the_real_models() -> None:
    from transformers import AutoConfig

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

"""Files of a G²VLM model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.authors_g2vlm import head_shapes, language_shapes, vision_shapes
from support.tiny_g2vlm import StandInHeads, drawn, drawn_images, drawn_tail, tiny_g2vlm, tiny_qwen

from gasp_fast.g2vlm.checkpoint import load_model, load_weights, new_model, official_names, row_blocks, save_model
from gasp_fast.g2vlm.experts import ExpertsConfig
from gasp_fast.g2vlm.heads import GeometryHeads, HeadsConfig
from gasp_fast.g2vlm.model import G2VLM
from gasp_fast.g2vlm.saved import load_geometry_model

LAYER = "language_model.model.layers.2."
NAMES = {
    *(f"{LAYER}self_attn.{letter}_proj{kind}.weight" for letter in "qkvo" for kind in ("", "_moe_geo")),
    *(f"{LAYER}self_attn.{letter}_proj{kind}.bias" for letter in "qkv" for kind in ("", "_moe_geo")),
    *(f"{LAYER}self_attn.{letter}_norm{kind}.weight" for letter in "qk" for kind in ("", "_moe_geo")),
    *(f"{LAYER}mlp{kind}.{name}_proj.weight" for name in ("gate", "up", "down") for kind in ("", "_moe_geo")),
    *(f"{LAYER}{name}_layernorm{k}.weight" for name in ("input", "post_attention") for k in ("", "_moe_geo")),
    f"{LAYER}ls1.gamma",
    f"{LAYER}ls2.gamma",
}
OTHERS = {
    "language_model.model.embed_tokens.weight",
    "language_model.model.norm.weight",
    "language_model.model.norm_moe_geo.weight",
    "language_model.lm_head.weight",
    "dino2llm.weight",
    "dino2llm.bias",
    "dino_model.encoder.layer.0.attention.attention.query.weight",
    "dino_model.encoder.layer.0.attention.output.dense.bias",
    "dino_model.embeddings.register_tokens",
    "vit_model.blocks.0.attn.qkv.weight",
    "vit_model.merger.mlp.2.bias",
    "points.weight",  # of the stand-in for heads
}


def test_a_saved_model_has_the_authors_names_and_loads_again(tmp_path):
    model = tiny_g2vlm()
    save_model(model, tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {name for name in names if name.startswith(LAYER)} == NAMES
    assert names >= OTHERS
    loaded = load_model(tmp_path, StandInHeads(), ExpertsConfig())
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.qwen_config.vision_start_token_id == model.qwen_config.vision_start_token_id
    assert load_weights(loaded, tmp_path) == []


def test_every_weight_of_the_full_size_has_the_name_and_shape_that_the_authors_gave_it():
    from transformers import (
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
    )

    text = {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    dino = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
    with torch.device("meta"):
        qwen = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config={"hidden_size": 1536}))
        encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**dino, image_size=518))
        model = G2VLM(qwen, encoder, GeometryHeads())
    found = {}
    for name, weight in model.state_dict().items():
        names = official_names(name)
        rows = row_blocks(model, name) if len(names) > 1 else [len(weight)]
        for theirs, count in zip(names, rows, strict=True):
            assert theirs not in found
            found[theirs] = (count, *weight.shape[1:])
    expected = head_shapes() | language_shapes() | vision_shapes()
    assert found == expected


def test_a_folder_of_the_authors_loads_with_its_heads(tmp_path):
    """It has no file with the sizes of the heads."""
    model, width = tiny_g2vlm(), 64
    model.heads = drawn(GeometryHeads(HeadsConfig(hidden=width, width=width)))
    save_model(model, tmp_path)
    (tmp_path / "geometry_config.json").unlink()
    loaded = load_geometry_model(tmp_path).model
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert load_weights(loaded, tmp_path) == []


def test_configurations_of_older_transformers_load(tmp_path):
    """Their rotary settings have other names, and they name a type, which the weights do not get."""
    model = tiny_g2vlm()
    save_model(model, tmp_path)
    text = json.loads((tmp_path / "text_config.json").read_text())
    rotary = text.pop("rope_parameters")
    text["rope_theta"] = rotary["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rotary["mrope_section"]}
    text |= {"model_type": "qwen2_vl", "torch_dtype": "bfloat16", "tie_word_embeddings": True, "qk_norm": True}
    (tmp_path / "text_config.json").write_text(json.dumps(text))
    loaded = load_model(tmp_path, StandInHeads()).eval()
    with torch.no_grad():
        ours, theirs = (each.states(drawn_images(), drawn_tail())[0].tail for each in (loaded, model))
    assert torch.equal(ours, theirs)


def test_a_new_model_begins_with_qwen_and_dino(tmp_path):
    tiny_qwen().save_pretrained(tmp_path / "qwen")
    tiny_g2vlm().encoder.save_pretrained(tmp_path / "dino")
    model = new_model(tmp_path / "qwen", tmp_path / "dino", StandInHeads())
    stored = load_file(tmp_path / "qwen" / "model.safetensors")
    key = next(tensor for name, tensor in stored.items() if name.endswith("layers.1.self_attn.k_proj.weight"))
    for expert in (model.experts.layers[1].geometric, model.experts.layers[1].semantic):
        assert torch.equal(expert.qkv.weight.split(expert.qkv_rows)[1], key)
    assert not model.patch_map.weight.any()


def test_incomplete_and_other_files_are_refused(tmp_path):
    model = tiny_g2vlm()
    save_model(model, tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "more": torch.zeros(1)}, path)
    assert load_weights(model, tmp_path) == ["more"]
    save_file({**weights, "dino2llm.bias": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"dino2llm.bias has the shape \(1,\), the model's \(64,\)"):
        load_weights(model, tmp_path)
    del weights["dino2llm.bias"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"1 weights are in no safetensors file, such as dino2llm.bias"):
        load_weights(model, tmp_path)

"""Files of a G²VLM model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_g2vlm import StandInHeads, drawn_images, drawn_tail, tiny_g2vlm, tiny_qwen

from gasp_fast.g2vlm.checkpoint import load_model, load_weights, new_model, save_model
from gasp_fast.g2vlm.experts import ExpertsConfig

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
    "heads.points.weight",
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
    heads = StandInHeads()
    before = heads.points.weight.clone()
    load_model(tmp_path, heads, with_heads=False)
    assert torch.equal(heads.points.weight, before)


def test_configurations_of_older_transformers_load(tmp_path):
    """With other names of the rotary settings, and a type that the weights shall not get."""
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

"""Loading a model for evaluation: checkpoints, heads and adapters."""

from __future__ import annotations

import shutil

import pytest
import torch

from gasp_fast.backbones import tiny
from gasp_fast.evaluation.evaluated_model import load_evaluated_model
from gasp_fast.supervision.head_files import write_heads


def test_retrained_weights_in_the_same_folder_are_another_model(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["qwen-gqa"], tmp_path / "model")
    before = load_evaluated_model(folder).fingerprint
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert load_evaluated_model(folder).fingerprint != before


def test_heads_of_the_last_checkpoint_are_loaded(models, model_folders, tmp_path):
    heads = models["qwen-gqa"].heads
    run = tmp_path / "run"
    for number, shift in ((9, 1.0), (10, 0.0)):  # the last checkpoint by number, not by name
        folder = shutil.copytree(model_folders["qwen-gqa"], run / f"checkpoint-{number}")
        write_heads(folder / "heads.safetensors", {k: v + shift for k, v in heads.state_dict().items()}, "fp32")
    model = load_evaluated_model(run)
    assert model.heads_origin == "trained" and model.name == "run"
    assert all(torch.equal(v, heads.state_dict()[k]) for k, v in model.heads.state_dict().items())
    assert load_evaluated_model(model_folders["qwen-gqa"]).heads is None


def test_a_newest_checkpoint_without_weights_is_refused(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "config.json").write_text("{}")
    with pytest.raises(OSError, match="checkpoint-3 holds no gathered weights"):
        load_evaluated_model(tmp_path)


def test_heads_of_another_model_are_refused(models, tmp_path):
    folder = tiny.build_tiny(tmp_path / "small", tiny.TinyConfig(hidden_size=64, frame_size=112))
    write_heads(folder / "heads.safetensors", models["qwen-gqa"].heads.state_dict(), "fp32")
    with pytest.raises(ValueError, match="they belong to another model"):
        load_evaluated_model(folder)


def test_an_adapter_is_part_of_the_evaluated_model(model_folders, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = load_evaluated_model(model_folders["qwen-gqa"])
    adapted = get_peft_model(
        base.backbone.load_model(dtype=torch.float32),
        LoraConfig(r=4, target_modules=base.backbone.lora_targets, init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    model = load_evaluated_model(tmp_path / "adapter")
    before, after = (base.backbone.query_projection(one.model, 1)[0] for one in (base, model))
    low_rank = adapted.get_base_model().model.language_model.layers[1].self_attn.q_proj
    assert torch.allclose(after - before, low_rank.get_delta_weight("default"), atol=1e-6)
    assert (after - before).abs().max() > 1e-3

"""Loading a model for evaluation: checkpoints, heads and adapters."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gasp_fast.backbones import chat, load_backbone, tiny
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


@pytest.mark.parametrize("place", ["checkpoint-1", "."])
def test_frames_are_passed_as_the_run_passed_them(model_folders, tmp_path, place):
    folder = shutil.copytree(model_folders["qwen-gqa"], tmp_path / "run" / "checkpoint-1")
    assert load_evaluated_model(folder).backbone.frames_as == "images"
    config = tmp_path / "run" / place / "config.yaml"
    for choice in ("images", "video_doubled"):
        config.write_text(f"model: {{source: somewhere, frames_as: {choice}}}")
        assert load_evaluated_model(tmp_path / "run").backbone.frames_as == choice
        assert load_evaluated_model(folder, frames_as="images").backbone.frames_as == "images"
    config.write_text("model: {frames_as: video_pairs}")
    with pytest.raises(ValueError, match=r"merges frames into one grid of tokens.*--frames-as video_doubled"):
        load_evaluated_model(folder)
    assert load_evaluated_model(folder, frames_as="video_doubled").backbone.frames_per_grid == 1
    config.write_text("model: {frames_as: [film]}")
    with pytest.raises(ValueError, match="is unknown; choose one of images"):
        load_evaluated_model(folder)


def save_adapter(base, folder):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        base.backbone.load_model(dtype=torch.float32),
        LoraConfig(r=4, target_modules=base.backbone.lora_targets, init_lora_weights=False),
    )
    adapted.save_pretrained(folder)
    return adapted


def test_an_adapter_is_part_of_the_evaluated_model(model_folders, tmp_path):
    base = load_evaluated_model(model_folders["qwen-gqa"])
    adapted = save_adapter(base, tmp_path / "adapter")
    model = load_evaluated_model(tmp_path / "adapter")
    before, after = (base.backbone.query_projection(one.model, 1)[0] for one in (base, model))
    low_rank = adapted.get_base_model().model.language_model.layers[1].self_attn.q_proj
    assert torch.allclose(after - before, low_rank.get_delta_weight("default"), atol=1e-6)
    assert (after - before).abs().max() > 1e-3


def test_the_base_model_is_the_one_that_the_configuration_of_the_run_names(model_folders, tmp_path):
    """As `gasp-fast export` chooses it."""
    save_adapter(load_evaluated_model(model_folders["qwen-gqa"]), tmp_path / "checkpoint-1")
    other = shutil.copytree(model_folders["qwen-gqa"], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] = 2 * weights["lm_head.weight"]
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.yaml").write_text(f"model: {{source: {other}}}")
    by_run = load_evaluated_model(tmp_path).model
    assert torch.equal(by_run.lm_head.weight, weights["lm_head.weight"])
    given = load_evaluated_model(tmp_path, base=str(model_folders["qwen-gqa"]))
    assert torch.equal(given.model.lm_head.weight, weights["lm_head.weight"] / 2)
    assert given.base == str(model_folders["qwen-gqa"])


def test_a_hub_model_that_only_the_run_names_is_not_looked_up(model_folders, tmp_path, connections):
    save_adapter(load_evaluated_model(model_folders["qwen-gqa"]), tmp_path / "checkpoint-1")
    for name in ("someone/else", "./moved/away", "/no/such/folder"):
        (tmp_path / "config.yaml").write_text(f"model: {{source: {name}}}")
        with pytest.raises(OSError, match=f"'{name}' of the run is neither a folder here nor .*--base"):
            load_evaluated_model(tmp_path)
    adapter = json.loads((tmp_path / "checkpoint-1" / "adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = "someone/else"
    (tmp_path / "checkpoint-1" / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(OSError, match="'someone/else' of the run is neither"):
        load_evaluated_model(tmp_path)
    assert not connections
    with pytest.raises(OSError, match="someone/else"):
        load_evaluated_model(tmp_path, base="someone/else")
    assert connections  # the name was given here


def test_a_folder_whose_files_name_a_hub_model_is_not_looked_up(model_folders, tmp_path, connections):
    base = shutil.copytree(model_folders["qwen-gqa"], tmp_path / "base")
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else", "peft_type": "LORA"}')
    save_adapter(load_evaluated_model(model_folders["qwen-gqa"]), tmp_path / "adapter")
    with pytest.raises(OSError, match="cannot be loaded"):
        load_evaluated_model(tmp_path / "adapter", base=str(base))
    assert not connections


def tokens(model) -> int:
    return model.backbone.frame_grid(400, 300).tokens


def test_frames_are_as_large_as_in_the_run_that_trained_the_model(model_folders, tmp_path):
    """Of adapters, of a checkpoint with all weights, and of the run's export; a given number comes first."""
    base = load_evaluated_model(model_folders["qwen-gqa"])
    save_adapter(base, tmp_path / "lora" / "checkpoint-1")
    shutil.copytree(model_folders["qwen-gqa"], tmp_path / "full" / "checkpoint-1")
    (tmp_path / "full" / "checkpoint-1" / "about.json").write_text("{}")
    shutil.copytree(model_folders["qwen-gqa"], tmp_path / "full" / "export")
    (tmp_path / "full" / "log.jsonl").touch()
    for run in ("lora", "full"):
        source = model_folders["qwen-gqa"]
        (tmp_path / run / "config.yaml").write_text(f"model: {{source: {source}, frame_pixels: 6400}}")
    limit = load_backbone(model_folders["qwen-gqa"], 6400).frame_grid(400, 300).tokens
    assert 0 < limit < tokens(base)
    for folder in ("lora", "full", "full/export"):
        model = load_evaluated_model(tmp_path / folder)
        assert model.frame_pixels == 6400 and tokens(model) == limit
    given = load_evaluated_model(tmp_path / "lora", frame_pixels=3200)
    assert given.frame_pixels == 3200 and tokens(given) < limit
    shutil.copytree(model_folders["qwen-gqa"], tmp_path / "full" / "other")
    assert load_evaluated_model(tmp_path / "full" / "other").frame_pixels is None  # not of the run


@pytest.mark.parametrize("value", ["many", "-1", "0.5", "true"])
def test_a_run_with_a_damaged_size_of_frames_is_refused_in_one_line(model_folders, tmp_path, value):
    save_adapter(load_evaluated_model(model_folders["qwen-gqa"]), tmp_path / "checkpoint-1")
    source = model_folders["qwen-gqa"]
    (tmp_path / "config.yaml").write_text(f"model: {{source: {source}, frame_pixels: {value}}}")
    with pytest.raises(ValueError, match=r"checkpoint-1: config\.yaml: model\.frame_pixels = ") as caught:
        load_evaluated_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["bogus", "meta", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(model_folders, device):
    with pytest.raises(ValueError, match=f"device = '{device}' cannot be used here") as caught:
        load_evaluated_model(model_folders["qwen-gqa"], device=device)
    assert "\n" not in str(caught.value)


def test_a_chat_template_that_does_not_end_is_refused(model_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.3)
    folder = shutil.copytree(model_folders["qwen-gqa"], tmp_path / "model")
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(loop)
    with pytest.raises(OSError, match=r"model = .* cannot be loaded: the chat template does not end"):
        load_evaluated_model(folder)

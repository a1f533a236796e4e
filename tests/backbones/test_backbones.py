"""A backbone describes its model correctly and encodes batches that the model accepts."""

import json
import pickle

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.families import EVERY_FAMILY, EVERY_QWEN, EVERY_SHIPPED, SHIPPED
from torch import nn

from gasp_fast.backbones import Backbone, load_backbone, register, supported_models, tiny, unwrap
from gasp_fast.backbones.qwen_vl import check_mrope
from gasp_fast.supervision.heads import CorrespondenceHeads


@EVERY_FAMILY
def test_the_type_in_config_json_decides(family):
    assert family.backbone.model_type == family.model.config.model_type
    assert family.backbone.layer_count == len(family.backbone.decoder_layers(family.model)) == 4


def test_a_third_backbone_is_one_file(families):
    assert {*SHIPPED, "llava"} <= set(supported_models())
    assert type(families["llava"].backbone).__module__ == "custom_backbone"


def test_an_unsupported_type_raises_an_error_that_names_the_supported_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(
        ValueError, match=r"type 'bert'; supported types are internvl, .*llava_next_video, .*qwen2_5_vl"
    ):
        load_backbone(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"it has no config\.json"):
        load_backbone(tmp_path / "empty")
    for typo in (tmp_path / "nothing-here", "qwen", "./qwen"):  # the hub is not tried
        with pytest.raises(OSError, match="there is no such folder, and a hub name has the form OWNER/NAME"):
            load_backbone(typo)


def test_two_backbones_cannot_register_one_type():
    class Other(Backbone):
        model_type = "qwen2_5_vl"

    with pytest.raises(ValueError, match="already taken by Qwen2_5_VL"):
        register(Other)


@EVERY_SHIPPED
def test_a_pickled_backbone_encodes_the_same(shipped, talk, noise):
    copy = pickle.loads(pickle.dumps(shipped.backbone))
    batch = [talk(noise(2))]
    for name, value in shipped.backbone.encode(batch).inputs.items():
        assert torch.equal(value, copy.encode(batch).inputs[name])


@EVERY_SHIPPED
def test_lora_adapts_q_k_v_o_of_every_decoder_layer_and_nothing_else(shipped):
    model = shipped.backbone.load_model(dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=shipped.backbone.lora_targets))
    names = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert len(names) == 4 * shipped.backbone.layer_count
    assert all("language_model.layers." in name for name in names)
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_pattern_without_the_module_path_would_adapt_the_vision_tower_of_llava(llava_video):
    model = llava_video.backbone.load_model(dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    assert any("vision_tower" in name for name, module in adapted.named_modules() if hasattr(module, "lora_A"))


@EVERY_SHIPPED
def test_modules_are_found_inside_wrappers_and_adapters(shipped):
    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    backbone, model = shipped.backbone, shipped.backbone.load_model(dtype=torch.float32)
    weight, bias = backbone.query_projection(model, 2)
    assert (bias is not None) == (
        backbone.config.text_config.model_type in ("qwen2", "qwen2_vl_text", "qwen2_5_vl_text")
    )
    wrapped = Wrapped(get_peft_model(model, LoraConfig(r=2, target_modules=backbone.lora_targets)))
    assert unwrap(wrapped) is model
    assert backbone.query_projection(wrapped, 2)[0] is weight
    assert weight is model.get_parameter("model.language_model.layers.2.self_attn.q_proj.weight") or weight.equal(
        model.get_submodule("model.language_model.layers.2.self_attn.q_proj").base_layer.weight
    )


@EVERY_SHIPPED
def test_heads_initialised_at_full_rank_give_the_queries_of_their_layer(shipped):
    backbone = shipped.backbone
    projections = {layer: backbone.query_projection(shipped.model, layer) for layer in (0, 3)}
    full = CorrespondenceHeads.from_query_projections(projections, mid_size=backbone.hidden_size)
    x = torch.randn(10, backbone.hidden_size)
    for layer in (0, 3):
        head = full.by_layer[str(layer)]
        queries = backbone.attention(shipped.model, layer).q_proj(x)
        torch.testing.assert_close(head.second(head.first(x)), queries, rtol=1e-4, atol=1e-5)


@EVERY_SHIPPED
def test_attention_shape_is_that_of_the_projections(shipped):
    shape = shipped.backbone.attention_shape
    attention = shipped.backbone.attention(shipped.model, 0)
    assert attention.q_proj.out_features == shape.query_heads * shape.head_dim
    assert attention.k_proj.out_features == shape.key_heads * shape.head_dim
    assert (shape.key_heads < shape.query_heads) == (shipped.backbone.model_type != "llava_next_video")


def test_a_saved_tiny_model_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("transformers.Qwen2_5_VLProcessor.save_pretrained", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.build_tiny(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    tiny.build_tiny(tmp_path / "model")
    with pytest.raises(FileExistsError, match="exists already"):
        tiny.build_tiny(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tiny_model_is_the_same_every_time_and_leaves_the_callers_random_state(tmp_path, families):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = load_backbone(tiny.build_tiny(tmp_path / "again"))
    assert torch.equal(torch.rand(3), expected)
    theirs = families["qwen2_5_vl"].model.state_dict()
    for name, value in again.load_model(dtype=torch.float32).state_dict().items():
        assert torch.equal(value, theirs[name])


def test_every_frame_of_qwen_has_its_own_grid(qwen, talk, noise):
    frames = noise(1, 224, 224) + noise(1, 320, 180) + noise(1, 90, 200)
    encoded = qwen.backbone.encode([talk(frames)])
    assert [(grid.columns, grid.rows) for grid in encoded.grids[0]] == [(14, 14), (18, 10), (6, 12)]


def test_frames_that_llava_cannot_take_raise_an_error_with_the_cure(llava_video, talk, noise):
    with pytest.raises(ValueError, match=r"sizes 200x100, 224x224.*resize"):
        llava_video.backbone.encode([talk(noise(1) + noise(1, 200, 100))])
    with pytest.raises(ValueError, match="frame_pixels = 100"):
        llava_video.backbone.limit_frame_pixels(100)


def test_fewer_pixels_per_frame_give_fewer_tokens(qwen, talk, noise):
    backbone = load_backbone(qwen.folder, frame_pixels=100 * 16 * 16)
    (positions,) = backbone.encode([talk(noise(2, 320, 180))]).positions
    assert 2 * 60 < len(positions) <= 2 * 100
    with pytest.raises(ValueError, match="frame_pixels = 100 is less than one token; use at least 256"):
        backbone.limit_frame_pixels(100)


def test_frames_that_are_not_rgb_bytes_raise_an_error(shipped, talk):
    with pytest.raises(ValueError, match=r"frame 0 of sequence 0 is float64 \[8, 8, 3\]"):
        shipped.backbone.encode([talk([np.zeros((8, 8, 3))])])


def test_a_batch_longer_than_the_models_context_raises_an_error(shipped, talk, noise, monkeypatch):
    monkeypatch.setattr(shipped.backbone.config.text_config, "max_position_embeddings", 100)
    with pytest.raises(ValueError, match="takes 100; use fewer frames"):
        shipped.backbone.encode([talk(noise(1))])


# ---- Qwen's three-dimensional positions ------------------------------------------------------------------------------


@pytest.fixture
def pictured(qwen, talk, noise):
    batch = [talk(noise(3, 320, 180)), talk(noise(1)), talk([])]
    return qwen.backbone.encode(batch).inputs


def positions_used(qwen, inputs):
    """The positions that the language model receives, and the logits."""
    received = []
    hook = lambda module, args, kwargs: received.append(kwargs["position_ids"])  # noqa: E731
    handle = qwen.model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        logits = qwen.model(**inputs).logits
    handle.remove()
    return received[0], logits


@EVERY_QWEN
def test_the_mrope_check_accepts_the_processors_output(qwen, pictured):
    check_mrope(qwen.model, pictured)
    qwen.backbone.check_inputs(qwen.model, pictured)
    used, _ = positions_used(qwen, pictured)
    derived, _ = qwen.model.model.get_rope_index(
        pictured["input_ids"],
        mm_token_type_ids=pictured["mm_token_type_ids"],
        image_grid_thw=pictured["image_grid_thw"],
        attention_mask=pictured["attention_mask"],
    )
    assert torch.equal(used[-3:], derived)  # the check looks at the positions that the forward pass uses


@pytest.mark.parametrize("name", ["mm_token_type_ids", "image_grid_thw"])
def test_the_mrope_check_raises_when_an_input_is_missing(qwen, pictured, name):
    pictured.pop(name)
    with pytest.raises(ValueError, match=f"inputs lack {name}.*remove_unused_columns=False"):
        check_mrope(qwen.model, pictured)


@EVERY_QWEN
def test_text_alone_needs_no_image_positions(qwen, talk):
    inputs = qwen.backbone.encode([talk([])]).inputs
    inputs.pop("mm_token_type_ids")
    check_mrope(qwen.model, inputs)


def test_without_token_types_the_model_raises_no_error_and_is_wrong(qwen, pictured):
    _, right = positions_used(qwen, pictured)
    pictured.pop("mm_token_type_ids")
    used, wrong = positions_used(qwen, pictured)
    assert used is None or torch.equal(used[-3], used[-1])
    assert (right - wrong).abs().max() > 1e-4


@EVERY_QWEN
def test_the_mrope_check_raises_for_token_types_of_another_batch(qwen, pictured):
    pictured["mm_token_type_ids"] = pictured["mm_token_type_ids"].roll(1, dims=1)
    with pytest.raises(ValueError, match="mm_token_type_ids disagrees with input_ids"):
        check_mrope(qwen.model, pictured)


@EVERY_QWEN
def test_the_mrope_check_raises_for_another_rule_of_positions(qwen, pictured, monkeypatch):
    plain = torch.arange(pictured["input_ids"].shape[1]).expand(3, *pictured["input_ids"].shape)
    monkeypatch.setattr(qwen.model.model, "get_rope_index", lambda *a, **k: (plain, None))
    with pytest.raises(ValueError, match=r"token \d+ of sequence 0 would get position"):
        check_mrope(qwen.model, pictured)

"""The base model of a run is loaded as configured."""

import sys
from types import SimpleNamespace

import pytest
import torch

from gasp_fast.backbones.base_model import ModelConfig, choose_attention, load_base_model, use_checkpointing, use_liger
from gasp_fast.backbones.window_attention import BatchedWindowAttention

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_base_model_has_the_weights_of_its_folder_in_the_given_type(shipped):
    config = ModelConfig(source=str(shipped.folder), dtype="fp32")
    backbone, model = load_base_model(config, CPU, torch.bfloat16)
    assert backbone.model_type == shipped.backbone.model_type
    expected = shipped.model.state_dict()
    assert list(model.state_dict()) == list(expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name].to(torch.bfloat16))


def test_frame_pixels_reach_the_processor_and_slow_modules_are_replaced(qwen):
    config = ModelConfig(source=str(qwen.folder), frame_pixels=100 * 16 * 16)
    backbone, model = load_base_model(config, CPU, torch.float32)
    assert backbone.frame_grid(320, 180).tokens <= 100
    assert isinstance(model.model.visual.blocks[0].attn, BatchedWindowAttention)


def test_automatic_attention_is_sdpa_where_flash_attention_cannot_run(monkeypatch):
    for name in ("is_flash_attn_2_available", "is_flash_attn_3_available"):
        monkeypatch.setattr(f"transformers.utils.{name}", lambda: True)
    assert choose_attention(ModelConfig(source="m"), CPU) == "sdpa"
    assert choose_attention(ModelConfig(source="m", dtype="fp32"), GPU) == "sdpa"
    assert choose_attention(ModelConfig(source="m"), GPU) == "flash_attention_3"
    monkeypatch.setattr("transformers.utils.is_flash_attn_3_available", lambda: False)
    assert choose_attention(ModelConfig(source="m"), GPU) == "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_3' is not installed; use model\.attention=auto"):
        choose_attention(ModelConfig(source="m", attention="flash_attention_3"), GPU)
    with pytest.raises(ValueError, match="needs a GPU and bf16, and this is cpu, bf16"):
        choose_attention(ModelConfig(source="m", attention="flash_attention_2"), CPU)


def test_liger_is_applied_by_model_type_and_without_its_loss(monkeypatch):
    calls = []
    liger = SimpleNamespace(apply_liger_kernel_to_qwen2_5_vl=lambda **options: calls.append(options))
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=liger))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    qwen, other = (SimpleNamespace(config=SimpleNamespace(model_type=name)) for name in ("qwen2_5_vl", "other"))
    use_liger(qwen)
    assert calls == [{"model": qwen, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    with pytest.raises(ValueError, match=r"does not support other; use model\.liger=false"):
        use_liger(other)


def test_without_liger_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        use_liger(SimpleNamespace(config=SimpleNamespace(model_type="qwen2_5_vl")))


@pytest.mark.parametrize("kind", ["off", "non_reentrant", "reentrant"])
def test_a_trained_layer_above_frozen_embeddings_receives_its_gradient_under_any_checkpointing(
    shipped, talk, noise, kind
):
    inputs = shipped.backbone.encode([talk(noise(1, 64, 64))]).inputs
    gradients = []
    for checkpointing in ("off", kind):
        model = shipped.backbone.load_model(dtype=torch.float32).requires_grad_(False).train()
        weight = shipped.backbone.attention(model, 1).q_proj.weight.requires_grad_(True)
        use_checkpointing(model, checkpointing)
        model(**inputs, use_cache=False).loss.backward()
        gradients.append(weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])

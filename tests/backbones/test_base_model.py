"""The base model of a run is loaded as configured."""

import sys
from collections import Counter

import pytest
import torch
from support import liger_stand_in
from support.families import EVERY_SHIPPED, SHIPPED
from torch.nn.attention import SDPBackend, sdpa_kernel

from gasp_fast.backbones.attention_kernel import attention_kernel
from gasp_fast.backbones.base_model import ModelConfig, choose_attention, load_base_model, use_checkpointing
from gasp_fast.backbones.liger import choose_liger, use_liger
from gasp_fast.backbones.window_attention import BatchedWindowAttention
from gasp_fast.config.loader import load_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@EVERY_SHIPPED
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


class Capability:
    """Pretends that the GPU has a compute capability, and that some packages are installed."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def __call__(self, major, *versions):
        self.monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
        for version in (2, 3, 4):
            name = f"transformers.utils.is_flash_attn_{version}_available"
            self.monkeypatch.setattr(name, lambda found=version in versions: found)


@pytest.fixture
def pretend(monkeypatch):
    return Capability(monkeypatch)


@pytest.mark.parametrize(
    ("major", "installed", "expected"),
    [
        (8, (), "sdpa"),
        (8, (2, 3, 4), "flash_attention_2"),  # Ampere and Ada
        (9, (), "sdpa"),
        (9, (2,), "sdpa"),  # on Hopper, cuDNN's is faster
        (9, (2, 3, 4), "flash_attention_3"),
        (10, (2, 3), "sdpa"),
        (10, (2, 4), "flash_attention_4"),
        (12, (2, 3, 4), "sdpa"),
    ],
)
def test_automatic_attention_is_flash_attention_only_where_it_is_no_slower_than_sdpa(
    pretend, major, installed, expected
):
    pretend(major, *installed)
    assert choose_attention(ModelConfig(source="m"), GPU) == expected
    assert choose_attention(ModelConfig(source="m"), CPU) == "sdpa"
    assert choose_attention(ModelConfig(source="m", dtype="fp32"), GPU) == "sdpa"


def test_attention_chosen_by_hand_is_used_or_a_clear_error(pretend):
    pretend(9, 2)
    assert choose_attention(ModelConfig(source="m", attention="flash_attention_2"), GPU) == "flash_attention_2"
    assert choose_attention(ModelConfig(source="m", attention="eager"), GPU) == "eager"
    with pytest.raises(ValueError, match=r"flash_attention_3' is not installed; use model\.attention=auto"):
        choose_attention(ModelConfig(source="m", attention="flash_attention_3"), GPU)
    with pytest.raises(ValueError, match="needs a GPU and bf16, and this is cpu, bf16"):
        choose_attention(ModelConfig(source="m", attention="flash_attention_2"), CPU)


def test_the_named_kernel_is_the_one_that_torch_runs(shipped):
    shape = shipped.backbone.attention_shape
    assert attention_kernel("flash_attention_3", shape, CPU, torch.bfloat16) == "FlashAttention 3"
    assert attention_kernel("sdpa", shape, CPU, torch.bfloat16) == "SDPA (CPU)"
    with sdpa_kernel(SDPBackend.MATH):
        assert attention_kernel("sdpa", shape, CPU, torch.bfloat16) == "SDPA (without a fused kernel)"


@EVERY_SHIPPED
def test_a_padded_batch_of_one_sequence_reaches_sdpa_without_a_mask(shipped, talk, noise, monkeypatch):
    """With a mask, torch would choose a slower kernel."""
    model = shipped.backbone.load_model(torch.float32)
    decoder, masks = shipped.backbone.language_model(model), []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, **options):
        if query.shape[1] == shipped.backbone.attention_shape.query_heads and inside:
            masks.append((attn_mask, options["is_causal"]))
        return plain(query, key, value, attn_mask=attn_mask, **options)

    inside = []
    decoder.register_forward_pre_hook(lambda *_: inside.append(True))
    decoder.register_forward_hook(lambda *_: inside.clear())
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    inputs = shipped.backbone.encode([talk(noise(1, 64, 64))]).inputs
    assert inputs["attention_mask"].all()
    model(**inputs, use_cache=False)
    assert masks == [(None, True)] * shipped.backbone.layer_count


# ---- Liger ----------------------------------------------------------------------------------------------------------


def test_liger_is_used_by_default_where_it_is_installed_and_there_is_a_gpu(shipped, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert not choose_liger("auto", shipped.backbone, GPU)
    with pytest.raises(ValueError, match="liger-kernel is not installed; pip install liger-kernel, or use"):
        choose_liger(True, shipped.backbone, GPU)
    monkeypatch.delitem(sys.modules, "liger_kernel")
    liger_stand_in.install(monkeypatch)
    assert choose_liger("auto", shipped.backbone, GPU) and choose_liger(True, shipped.backbone, GPU)
    assert not choose_liger(False, shipped.backbone, GPU) and not choose_liger("auto", shipped.backbone, CPU)
    with pytest.raises(ValueError, match=r"needs a GPU, and this is cpu; train on one, or use model\.liger=auto"):
        choose_liger(True, shipped.backbone, CPU)
    monkeypatch.setattr(type(shipped.backbone), "llama_layers", False)
    assert not choose_liger("auto", shipped.backbone, GPU)
    with pytest.raises(ValueError, match="Liger has no layers for"):
        choose_liger(True, shipped.backbone, GPU)


@pytest.mark.parametrize("setting", ["auto", "true", "false"])
def test_every_setting_of_liger_can_be_written_in_a_recipe(setting, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"source: m\nliger: {setting}\n")
    expected = {"auto": "auto", "true": True, "false": False}[setting]
    assert (
        load_config(ModelConfig, path).liger == expected == load_config(ModelConfig, path, [f"liger={setting}"]).liger
    )
    with pytest.raises(ValueError, match="liger = 'always' must be true or false or one of 'auto'"):
        load_config(ModelConfig, path, ["liger=always"])


@pytest.mark.parametrize("shipped", [name for name in SHIPPED if name != "qwen3_vl_moe"], indirect=True)
def test_ligers_layers_compute_the_same_with_the_same_weights(shipped, talk, noise, monkeypatch):
    liger_stand_in.install(monkeypatch)
    inputs = shipped.backbone.encode([talk(noise(1, 64, 64))]).inputs
    model = shipped.backbone.load_model(torch.float32)
    results = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        out = model(**inputs, use_cache=False)
        out.loss.backward()
        results.append((out.logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
        names, decoder = list(model.state_dict()), shipped.backbone.language_model(model)
        use_liger(shipped.backbone, model)
        assert list(model.state_dict()) == names
    (logits, gradients), (fused_logits, fused_gradients) = results
    torch.testing.assert_close(fused_logits, logits, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-3, atol=1e-5)
    kinds = Counter(type(module).__name__ for module in decoder.modules())
    layers = shipped.backbone.layer_count
    of_layer = 4 if hasattr(decoder.layers[0].self_attn, "q_norm") else 2
    assert kinds["LigerRMSNorm"] == of_layer * layers + 1 and kinds["LigerSwiGLUMLP"] == layers
    assert not any("Norm" in name and not name.startswith("Liger") for name in kinds)


def test_ligers_rotary_embedding_runs_on_a_gpu_under_gradients_only(shipped, monkeypatch):
    """It overwrites queries, which the evaluation reads without gradients."""
    liger_stand_in.install(monkeypatch)
    model = shipped.backbone.load_model(torch.float32)
    for _ in range(2):  # a second call changes nothing
        use_liger(shipped.backbone, model)
    rotary = sys.modules[type(shipped.backbone.attention(model, 0)).__module__].apply_rotary_pos_emb

    class OnGPU(torch.Tensor):
        is_cuda = True

    cos, sin = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    for kind, gradients, overwrites in ((OnGPU, True, True), (OnGPU, False, False), (torch.Tensor, True, False)):
        query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
        before = query.clone()
        with torch.set_grad_enabled(gradients):
            rotated, _ = rotary(query.as_subclass(kind), key.as_subclass(kind), cos, sin)
        assert torch.equal(query, before) is not overwrites
        half = torch.cat([-before[..., 4:], before[..., :4]], dim=-1)
        torch.testing.assert_close(rotated.as_subclass(torch.Tensor), before * cos[:, None] + half * sin[:, None])


# ---- gradient checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["off", "full", "non_reentrant", "reentrant"])
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


@EVERY_SHIPPED
def test_kept_layers_run_once_and_the_others_twice(shipped, talk, noise):
    inputs = shipped.backbone.encode([talk(noise(1, 64, 64))]).inputs
    model = shipped.backbone.load_model(dtype=torch.float32).requires_grad_(False).train()
    layers = shipped.backbone.decoder_layers(model)
    shipped.backbone.attention(model, 0).q_proj.weight.requires_grad_(True)
    use_checkpointing(model, "full", [layers[1], layers[3]])
    runs = Counter()
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: runs.update([number]))
    model(**inputs, use_cache=False).loss.backward()
    assert runs == {0: 2, 1: 1, 2: 2, 3: 1}

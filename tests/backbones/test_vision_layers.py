"""The fast layers of Qwen's vision tower compute what transformers' layers compute, from the same stored weights."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as original

from gasp_fast.backbones import load_backbone, tiny
from gasp_fast.backbones.adapters import AdapterConfig, add_adapters
from gasp_fast.backbones.vision_layers import FusedNorm, GatedMLP, PaddedLinear, rotate
from gasp_fast.export import export, load_plain_model

WIDTH = 84  # of the MLP: no multiple of 8, like the 3,420 of the 7B model


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """A tiny Qwen model whose vision MLP has an awkward width."""
    folder = tmp_path_factory.mktemp("awkward") / "model"
    config = tiny.TinyConfig(hidden_size=64, query_heads=2, frame_size=112, vision_intermediate_size=WIDTH)
    return load_backbone(tiny.build_tiny(folder, config))


def load(backbone, fast=True, dtype=torch.float32):
    model = backbone.load_model(dtype=dtype)
    if fast:
        backbone.replace_slow_modules(model)
    return model.train()


def padded(model):
    return [module for module in model.modules() if isinstance(module, PaddedLinear)]


@pytest.fixture
def inputs(awkward, talk, noise):
    frames = noise(1, 112, 112) + noise(1, 96, 64) + noise(1, 112, 112, seed=1)
    return awkward.encode([talk(frames)]).inputs


def test_an_mlp_of_awkward_width_is_padded_and_one_of_whole_tiles_is_not(awkward, qwen):
    assert len(padded(load(awkward))) == 2 * 3
    assert padded(load(qwen.backbone)) == []
    products = []
    model = load(awkward)
    for module in padded(model):
        module.register_forward_hook(lambda m, args, out: products.append((args[0].shape[-1], out.shape[-1])))
    model.model.visual(torch.randn(64, 384), grid_thw=torch.tensor([[1, 8, 8]]))
    assert products == [(64, 128), (64, 128), (128, 64)] * 2


def test_padding_changes_no_result_and_no_gradient(awkward):
    mlp = copy.deepcopy(load(awkward, fast=False).model.visual.blocks[0].mlp)
    results = []
    for module in (mlp, GatedMLP(copy.deepcopy(mlp))):
        x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        y = module(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters())])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_loading_and_saving_see_the_original_weights(awkward, tmp_path):
    fast, plain = load(awkward), load(awkward, fast=False)
    assert padded(fast)
    assert {n: v.shape for n, v in fast.state_dict().items()} == {n: v.shape for n, v in plain.state_dict().items()}
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(torch.randn_like(parameter) / 100)
    fast.save_pretrained(tmp_path / "saved")
    again = type(plain).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for name, value in fast.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    plain.load_state_dict(fast.state_dict())
    fresh = load(awkward)
    fresh.load_state_dict(again.state_dict())
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, fast.state_dict()[name])


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_trained_model_takes_the_steps_of_the_original(awkward, inputs, mode):
    results = []
    for fast in (True, False):
        model = load(awkward, fast)
        torch.manual_seed(0)
        model = add_adapters(awkward, model, AdapterConfig(rank=2)) if mode == "lora" else model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-3, weight_decay=0.1)
        losses = []
        for _ in range(3):
            loss = model(**inputs, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append((losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}))
    (losses, weights), (expected, originals) = results
    assert expected[-1] < expected[0] and losses == pytest.approx(expected, rel=1e-5)
    assert any("visual" in name for name in weights) == (mode == "full")
    assert weights.keys() == originals.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, originals[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_an_exported_model_computes_what_the_padded_one_did(awkward, inputs, tmp_path, mode):
    torch.manual_seed(0)
    model = load(awkward)
    model = add_adapters(awkward, model, AdapterConfig(rank=2)) if mode == "lora" else model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 20)
        expected = model.eval()(**inputs).logits
        assert (expected - load(awkward).eval()(**inputs).logits).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "checkpoint-1")
    awkward.processor.save_pretrained(tmp_path / "checkpoint-1")
    export(tmp_path / "checkpoint-1", tmp_path / "exported", base=awkward.source if mode == "lora" else None)
    with torch.no_grad():
        logits = load_plain_model(tmp_path / "exported")(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def rms(values):
    return values.double().square().mean().sqrt().item()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


# The error against float64 of an original in fp32 and in bf16 is that of rounding; ours is at most this much larger.
LARGER = 1.05


def test_rotary_embedding_is_as_accurate_as_the_original(dtype):
    torch.manual_seed(0)
    qkv = torch.randn(500, 3, 4, 20).to(dtype)
    angle = torch.rand(500, 10).repeat(1, 2) * 50
    query, key, value = rotate(qkv.clone(), angle.cos(), angle.sin())
    theirs = original.apply_rotary_pos_emb_vision(*qkv.unbind(1)[:2], angle.cos(), angle.sin())
    wide = qkv[:, :2].double()
    cos, sin = (factor[:, None, None].double() for factor in (angle.cos(), angle.sin()))
    exact = wide * cos + original.rotate_half(wide) * sin
    assert torch.equal(value, qkv[:, 2])
    for ours, their, truth in zip((query, key), theirs, exact.unbind(1), strict=True):
        assert ours.dtype == dtype
        assert 0 < rms(ours - truth) <= LARGER * rms(their - truth)
        assert rms(their - truth) < (3e-3 if dtype == torch.bfloat16 else 1e-7)


def test_norms_are_as_accurate_as_the_original(dtype):
    torch.manual_seed(0)
    norm = original.Qwen2_5_VLRMSNorm(96).to(dtype)
    nn.init.uniform_(norm.weight, 0.5, 2)
    x = (torch.randn(500, 96) * torch.logspace(-2, 2, 500)[:, None]).to(dtype)
    wide = x.double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, theirs = FusedNorm(norm)(x), norm(x)
    assert ours.dtype == theirs.dtype == dtype
    assert 0 < rms(ours - truth) <= LARGER * rms(theirs - truth)


def test_a_trained_norm_under_autocast_returns_what_the_original_returns():
    torch.manual_seed(0)
    norm = original.Qwen2_5_VLRMSNorm(96)
    nn.init.uniform_(norm.weight, 0.5, 2)
    x = torch.randn(50, 96).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = FusedNorm(norm)(x), norm(x)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)  # neighbours in bf16


def bf16_errors(backbone, device):
    """RMS error of the features of a frozen tower in bf16, ours and the original's, and the size of the features."""
    torch.manual_seed(0)
    grid = torch.tensor([[1, 14, 14], [1, 8, 12]])
    pixels = torch.randn(14 * 14 + 8 * 12, 384)
    with torch.no_grad():
        exact = load(backbone, fast=False).model.visual(pixels, grid_thw=grid).pooler_output
        errors = []
        for fast in (True, False):
            vision = load(backbone, fast, torch.bfloat16).model.visual.to(device)
            with torch.autocast(device, dtype=torch.bfloat16):
                features = vision(pixels.bfloat16().to(device), grid_thw=grid.to(device)).pooler_output
            assert features.dtype == torch.bfloat16
            errors.append(rms(features.cpu() - exact))
    return *errors, rms(exact)


def test_a_tower_in_bf16_is_as_close_to_fp32_as_the_original(awkward):
    ours, theirs, size = bf16_errors(awkward, "cpu")
    assert 0 < ours < 1.5 * theirs < 0.05 * size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tower_on_a_gpu_is_as_close_to_fp32_as_the_original(awkward):
    ours, theirs, size = bf16_errors(awkward, "cuda")
    assert 0 < ours < 1.5 * theirs < 0.05 * size

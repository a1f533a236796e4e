"""The transformer of two experts."""

import dataclasses

import pytest
import torch
from support.tiny_g2vlm import (
    IMAGE,
    WIDTH,
    Tail,
    drawn_images,
    drawn_tail,
    memory_order,
    slow_states,
    tiny_g2vlm,
    tiny_qwen,
)  # fmt: skip

from gasp_fast.g2vlm.model import G2VLM

CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.mark.parametrize("images", [True, False], ids=["images", "text"])
def test_without_frames_and_qk_norm_it_is_qwen(images):
    tail, model = drawn_tail(images=images), tiny_g2vlm(zero_map=True, qk_norm=False)
    torch.manual_seed(0)
    kinds = (tail.input_ids == IMAGE).int()
    theirs = tiny_qwen()(
        tail.input_ids, labels=tail.labels, pixel_values=tail.pixel_values, image_grid_thw=tail.image_grid_thw,
        mm_token_type_ids=kinds,
    )  # fmt: skip
    states, _ = model.states(None, tail)
    torch.testing.assert_close(model.lm_head(states.tail), theirs.logits, **CLOSE)
    torch.testing.assert_close(model(None, tail).text_loss, theirs.loss, **CLOSE)


@pytest.mark.parametrize("attention", ["global", "block_causal", "frame", "mixed"])
def test_it_equals_a_slow_model_of_the_same_weights(attention):
    """Tokens one by one, in the order of the sequence, under a dense mask, with the weights of a checkpoint's names."""
    model, images = tiny_g2vlm(attention=attention), drawn_images(batch=1)
    prefix, ids = torch.tensor([[5, 6]]), torch.tensor([[7, 8, 9, 10]])
    patterns = ["frame", "global", "frame"] if attention == "mixed" else [attention] * 3
    with torch.no_grad():
        expected = slow_states(model, images[0], prefix[0], ids[0], patterns)
        ours, _ = model.states(images, Tail(ids, ids), prefix)
    order = memory_order(3, 6, 2, 4)
    torch.testing.assert_close(ours.patches.flatten(0, 2), expected[order[:18]], **CLOSE)
    torch.testing.assert_close(ours.tail[0], expected[-4:], **CLOSE)


@pytest.mark.parametrize(("attention", "moves"), [("global", True), ("block_causal", False), ("frame", False)])
def test_the_last_frame_moves_the_points_of_the_first_one_under_global_attention_only(attention, moves):
    model, images = tiny_g2vlm(attention=attention), drawn_images()
    changed = images.clone()
    changed[:, -1] = drawn_images(seed=1)[:, -1]
    with torch.no_grad():
        before, after = (model(each).geometry.local[:, 0] for each in (images, changed))
    assert torch.equal(before, after) != moves


def test_geometry_never_depends_on_the_tail_but_the_tail_on_geometry():
    model, images, tail = tiny_g2vlm(), drawn_images(), drawn_tail()
    with torch.no_grad():
        alone, _ = model.states(images)
        asked, _ = model.states(images, tail)
        other, _ = model.states(drawn_images(seed=1), tail)
    torch.testing.assert_close(asked.patches, alone.patches, atol=1e-6, rtol=0)
    assert (asked.tail - other.tail).abs().amax(-1).min() > 1e-4  # of every token


def test_padding_changes_no_real_token():
    model, images, tail = tiny_g2vlm(), drawn_images(), drawn_tail(images=False)
    shorter = dataclasses.replace(tail, input_ids=tail.input_ids[:, :9], labels=tail.labels[:, :9])
    with torch.no_grad():
        padded, short = (model.states(images, each)[0].tail for each in (tail, shorter))
    torch.testing.assert_close(padded[:, :9], short, atol=1e-6, rtol=0)


def test_gradients_are_finite_at_the_zero_map():
    model = tiny_g2vlm(zero_map=True)
    assert not any(parameter.any() for parameter in model.patch_map.parameters())
    model(drawn_images()).geometry.local.square().mean().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(grad.isfinite().all() for grad in grads.values())
    assert grads["patch_map.weight"].any()


def test_checkpointing_changes_no_gradient():
    gradients = []
    for kind in ("off", "full", "every:2"):
        model = tiny_g2vlm(checkpointing=kind)
        output = model(drawn_images(), drawn_tail())
        (output.geometry.local.square().mean() + output.text_loss).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for others in gradients[1:]:
        for ours, theirs in zip(gradients[0], others, strict=True):
            assert torch.equal(ours, theirs)


def test_layers_keep_activations_as_said():
    """Counted as the saved tensors of a forward pass: a layer that recomputes keeps only its inputs."""
    saved = {}
    for kind in ("off", "every:2", "full"):
        kept: list[int] = []
        model = tiny_g2vlm(checkpointing=kind)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, kept=kept: kept.append(1) or tensor, lambda t: t):
            model(drawn_images())
        saved[kind] = len(kept)
    assert saved["off"] > saved["every:2"] > saved["full"]


@pytest.mark.parametrize("frozen", ["semantic", "geometric", "none"])
def test_frozen_parts_get_no_gradient(frozen):
    model = tiny_g2vlm().train()
    model.freeze(frozen)
    output = model(drawn_images(), drawn_tail())
    (output.geometry.local.square().mean() + output.text_loss).backward()
    assert not model.encoder.training and not model.visual.training
    for name, parameter in model.named_parameters():
        kind = _kind(name)
        assert (parameter.grad is not None) == parameter.requires_grad == (kind not in ("encoder", frozen)), name


def _kind(name):
    if name.startswith(("encoder.", "visual.")):
        return "encoder"
    semantic = name.startswith(("embedding.", "lm_head.", "experts.semantic_norm.")) or ".semantic." in name
    return "semantic" if semantic else "geometric"


def test_layer_scale_multiplies_geometric_tokens_only():
    model, images, tail = tiny_g2vlm(zero_map=True), drawn_images(), drawn_tail()
    scales = {name: scale for name, scale in model.named_parameters() if name.endswith("_scale.gamma")}
    assert len(scales) == 2 * 3 and all((scale == 0.01).all() for scale in scales.values())
    with torch.no_grad():
        model.patch_map.weight.normal_()
        before, _ = model.states(None, tail)
        for scale in scales.values():
            scale.zero_()
        after, _ = model.states(None, tail)
        untouched, _ = model.states(images, tail)
        features = model.encoder(images.flatten(0, 1)).last_hidden_state[:, -6:]  # behind CLS and registers
        expected = model.experts.geometric_norm(model.patch_map(features)).view(2, 3, 6, WIDTH)
    assert torch.equal(before.tail, after.tail)
    torch.testing.assert_close(untouched.patches, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_in_bf16():
    results = []
    for device in ("cpu", "cuda"):
        model = tiny_g2vlm().to(device)
        tail = drawn_tail()
        tail = Tail(*(getattr(tail, field.name).to(device) for field in dataclasses.fields(tail)))
        output = model(drawn_images().to(device), tail)
        assert output.geometry.local.dtype == output.text_loss.dtype == torch.float32
        (output.geometry.local.square().mean() + output.text_loss).backward()
        results.append((output.geometry.local.detach().cpu(), model.patch_map.weight.grad.cpu()))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 0.05 * ours.norm()


def test_heads_get_float32_and_sizes_of_the_grid():
    model = tiny_g2vlm()
    assert model(drawn_images()).geometry.local.shape == (2, 3, 28, 42, 3)
    assert model(drawn_images(), drawn_tail(), with_geometry=False).geometry is None
    with pytest.raises(ValueError, match="29 x 42 pixels; give multiples of 14"):
        model(torch.zeros(1, 1, 3, 29, 42))
    with pytest.raises(ValueError, match="give at least one"):
        model(None)


def test_both_experts_begin_as_qwens_decoder():
    model = tiny_g2vlm(zero_map=True)
    assert isinstance(model, G2VLM)
    for layer in model.experts.layers:
        geometric = {name: tensor for name, tensor in layer.geometric.state_dict().items() if "_scale" not in name}
        semantic = layer.semantic.state_dict()
        assert geometric.keys() == semantic.keys()
        assert all(torch.equal(tensor, semantic[name]) for name, tensor in geometric.items())

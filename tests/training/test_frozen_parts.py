"""Below the decoder, what is frozen costs a forward pass under every kind of checkpointing; what is trained learns."""

from collections import Counter

import pytest
import torch

from gasp_fast.backbones import unwrap
from gasp_fast.backbones.base_model import use_checkpointing
from gasp_fast.collator import Collator
from gasp_fast.training.model import build_model
from gasp_fast.training.stream import SampleStream

KINDS = ("off", "non_reentrant", "reentrant")
DEVICE = torch.device("cpu")


def prepare(config, family, checkpointing, mode="lora", **more):
    settings = config(family, train={"mode": mode, "checkpointing": checkpointing}, **more)
    model = build_model(settings, DEVICE).train()
    stream = SampleStream(settings.data)
    return model, Collator(model.backbone)([next(s for s in map(stream.__getitem__, range(50)) if s.tracks)])


def below_the_decoder(model):
    """Name and module of what turns pixels into features, down to the modules that have weights of their own."""
    base = unwrap(model.model).base_model
    decoder = set(model.backbone.language_model(model.model).modules())
    return {
        name: module
        for name, module in base.named_modules()
        if module is not base and module not in decoder and any(True for _ in module.parameters(recurse=False))
    }


def step(model, batch):
    """Runs forward and backward. How often each module below the decoder ran, and what it returned."""
    calls, outputs = Counter(), {}

    def hook(name):
        def count(module, args, output):
            calls[name] += 1
            outputs[name] = output

        return count

    handles = [module.register_forward_hook(hook(name)) for name, module in below_the_decoder(model).items()]
    model(**batch)["loss"].backward()
    for handle in handles:
        handle.remove()
    return calls, outputs


@pytest.mark.parametrize("checkpointing", KINDS)
def test_frozen_parts_run_once_a_step_and_without_a_graph(config, family, checkpointing):
    model, batch = prepare(config, family, checkpointing)
    frozen = below_the_decoder(model)
    calls, outputs = step(model, batch)
    assert any("layers.0" in name or "blocks.0" in name for name in calls)
    assert any("merger" in name or "projector" in name for name in calls)
    assert set(calls.values()) == {1}
    assert not any(output.requires_grad for output in outputs.values())
    assert all(parameter.grad is None for module in frozen.values() for parameter in module.parameters())


@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant"])
def test_a_trained_tower_is_checkpointed_and_learns(config, family, checkpointing):
    model, batch = prepare(config, family, checkpointing, mode="full")
    calls, _ = step(model, batch)
    first = [
        count for name, count in calls.items() if name.endswith(("blocks.0.attn.qkv", "layers.0.self_attn.q_proj"))
    ]
    assert first == [2]  # forward, and again for the gradient
    plain, _ = prepare(config, family, "off", mode="full")
    plain_calls, _ = step(plain, batch)
    assert set(plain_calls.values()) == {1}
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant"])
def test_adapters_and_heads_receive_the_gradient_of_a_step_without_checkpointing(config, family, checkpointing):
    model, batch = prepare(config, family, checkpointing)
    plain, _ = prepare(config, family, "off")
    step(model, batch), step(plain, batch)
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("checkpointing", KINDS)
def test_a_trained_projector_learns_above_a_frozen_tower_that_runs_once(config, checkpointing):
    model, batch = prepare(config, "llava_next_video", "off")
    projector = unwrap(model.model).base_model.multi_modal_projector.requires_grad_(True)
    use_checkpointing(model.model, checkpointing)
    calls, outputs = step(model, batch)
    assert set(calls.values()) == {1}
    assert not any(output.requires_grad for name, output in outputs.items() if name.startswith("vision_tower"))
    assert all(parameter.grad.any() for parameter in projector.parameters())


def assert_same_gradients(model, expected):
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    others = {name: p.grad for name, p in expected.named_parameters() if p.grad is not None}
    assert gradients.keys() == others.keys() and any(g.abs().max() > 0 for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, others[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )

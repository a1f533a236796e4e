"""Adapters compute what peft's compute, and are cast once where they are used many times."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from support.casts import CastCounter

from gasp_fast.backbones.adapters import AdapterConfig, add_adapters, cast_once
from gasp_fast.backbones.base_model import use_checkpointing


@pytest.fixture
def inputs(shipped, talk, noise):
    return shipped.backbone.encode([talk(noise(1, 64, 64))]).inputs


def moved(model):
    """The model, with adapters that change its output (B starts at zero)."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model.train()


def gradients_of_two_passes(model, inputs, context=nullcontext):
    with context():
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**inputs, use_cache=False).loss
            loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_gradients_are_those_of_peft_under_autocast_and_not_less_exact(shipped, inputs, checkpointing):
    options = {"r": 4, "lora_alpha": 8, "target_modules": shipped.backbone.lora_targets}
    theirs = moved(get_peft_model(shipped.backbone.load_model(torch.bfloat16), LoraConfig(**options)))
    ours = moved(add_adapters(shipped.backbone, shipped.backbone.load_model(torch.bfloat16), AdapterConfig(rank=4)))
    exact = moved(get_peft_model(shipped.backbone.load_model(torch.bfloat16).float(), LoraConfig(**options)))
    for model in (theirs, ours):
        use_checkpointing(model, checkpointing)
    loss, expected = gradients_of_two_passes(theirs, inputs)
    counter = CastCounter(ours)
    with counter:
        ours_loss, gradients = gradients_of_two_passes(ours, inputs, lambda: cast_once(ours, torch.bfloat16))
    assert set(counter.casts.values()) == {1} and len(counter.casts) == len(gradients)
    for _ in range(2):
        true_loss = exact(**inputs, use_cache=False).loss
        true_loss.backward()
    truth = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys() == truth.keys() and len(truth) > 8
    assert abs(ours_loss - true_loss) <= 2**-7 * true_loss and abs(ours_loss - loss) <= 2**-7 * loss
    ours_error, their_error = (
        sum((found[name] - truth[name]).square().sum() for name in truth) for found in (gradients, expected)
    )
    assert ours_error <= 1.2 * their_error and ours_error < 0.05**2 * sum(g.square().sum() for g in truth.values())
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_after_the_context_adapters_use_their_weights_as_they_are_then(shipped, inputs):
    model = moved(add_adapters(shipped.backbone, shipped.backbone.load_model(torch.bfloat16), AdapterConfig(rank=4)))
    with cast_once(model, torch.bfloat16):
        gradients_of_two_passes(model, inputs)
    first, _ = gradients_of_two_passes(model, inputs, lambda: cast_once(model, torch.bfloat16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    bare = shipped.backbone.load_model(torch.bfloat16).train()
    for context in (nullcontext, lambda: cast_once(model, torch.bfloat16)):
        loss, _ = gradients_of_two_passes(model, inputs, context)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss, bare(**inputs, use_cache=False).loss)
        assert not torch.equal(loss, first)


def test_without_autocast_adapters_compute_in_their_own_type(shipped, inputs):
    options = {"r": 4, "lora_alpha": 8, "target_modules": shipped.backbone.lora_targets}
    theirs = moved(get_peft_model(shipped.backbone.load_model(torch.bfloat16), LoraConfig(**options)))
    ours = moved(add_adapters(shipped.backbone, shipped.backbone.load_model(torch.bfloat16), AdapterConfig(rank=4)))
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


@pytest.mark.parametrize("shape", [(3, 5), (0,), (2, 0), ()])
def test_any_number_of_tokens_is_computed_as_peft_does(shipped, shape):
    options = {"r": 4, "lora_alpha": 8, "target_modules": shipped.backbone.lora_targets}
    models = (
        moved(get_peft_model(shipped.backbone.load_model(torch.float32), LoraConfig(**options))),
        moved(add_adapters(shipped.backbone, shipped.backbone.load_model(torch.float32), AdapterConfig(rank=4))),
    )
    layers = [next(m for m in model.modules() if isinstance(m, LoraLayer)) for model in models]
    x = torch.randn(*shape, layers[0].in_features, generator=torch.Generator().manual_seed(0))
    theirs, ours = (layer(x) for layer in layers)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours.shape == theirs.shape and type(layers[1]) is not type(layers[0])


def test_peft_saves_merges_and_loads_them_as_its_own(shipped, inputs, tmp_path):
    from peft import PeftModel

    ours = moved(add_adapters(shipped.backbone, shipped.backbone.load_model(torch.float32), AdapterConfig(rank=4)))
    ours.eval()
    with torch.no_grad():
        expected = ours(**inputs).logits
        ours.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(shipped.backbone.load_model(torch.float32), str(tmp_path)).eval()
        assert torch.equal(loaded(**inputs).logits, expected)
        torch.testing.assert_close(ours.merge_and_unload()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)

"""Streamed supervision is the plain loss on the plain heads, in less memory, under every kind of checkpointing."""

from dataclasses import replace

import pytest
import torch
from support.families import SHIPPED
from support.tiny_training import FAMILIES

from gasp_fast.backbones.base_model import DTYPES, use_checkpointing
from gasp_fast.collator import Collator
from gasp_fast.loss.function import gasp_loss
from gasp_fast.loss.metric import InMetric
from gasp_fast.supervision import geometric
from gasp_fast.supervision.heads import HeadsConfig
from gasp_fast.training.model import build_model
from gasp_fast.training.stream import SampleStream

CPU = torch.device("cpu")


def batch_of(config, model, positions=(0, 1)):
    stream = SampleStream(config.data)
    return Collator(model.backbone)([stream[position] for position in positions])


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", ["off", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("layers", ["all", "2-3"])
def test_a_streamed_step_is_the_plain_step(config, family, plain_step, checkpointing, layers):
    compare_steps(config, family, plain_step, checkpointing, layers)


@pytest.mark.parametrize("family", [name for name in SHIPPED if name not in FAMILIES], indirect=True)
def test_a_streamed_step_is_the_plain_step_in_every_family(config, family, plain_step):
    compare_steps(config, family, plain_step, "non_reentrant", "all")


def compare_steps(config, family, plain_step, checkpointing, layers):
    settings = config(family, heads={"layers": layers}, train={"checkpointing": "off"})
    reference = build_model(settings, CPU).train()
    batch = batch_of(settings, reference)
    expected = plain_step(reference, batch)
    expected.loss.backward()

    streamed = build_model(
        config(family, heads={"layers": layers}, train={"checkpointing": checkpointing}), CPU
    ).train()
    streamed.lm_weight = 0.0
    out = streamed(**batch)
    out["loss"].backward()
    torch.testing.assert_close(out["loss"], expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out["corr"], expected.corr_per_layer, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out["depth"], expected.depth_per_layer, rtol=1e-5, atol=1e-6)
    assert torch.equal(out["pck"], expected.metrics.pck.to(out["pck"].dtype))
    found, wanted = gradients(streamed), gradients(reference)
    assert len(wanted) > 4
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=2e-4, atol=2e-6, msg=name)
    for name in found.keys() - wanted.keys():
        assert not found[name].any(), name


@pytest.mark.parametrize("checkpointing", ["off", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("reads", ["output_normed", "layer_input_normed"])
def test_heads_read_normed_states_with_all_gradients(config, family, plain_step, reads, mode, checkpointing):
    settings = config(family, heads={"input": reads}, train={"mode": mode}, loss={"lm_weight": 0.0})
    reference = build_model(settings, CPU).train()
    torch.manual_seed(0)
    for name, parameter in reference.named_parameters():
        if "norm" in name and "language_model" in name:
            parameter.data.uniform_(0.2, 2)  # at one, as it is in a random model, a norm has a simpler gradient
    model = build_model(settings, CPU).train()
    model.load_state_dict(reference.state_dict())
    expected = plain_step(reference, batch_of(settings, reference))
    expected.loss.backward()
    use_checkpointing(model.model, checkpointing, [])
    out = model(**batch_of(settings, model))
    out["loss"].backward()
    torch.testing.assert_close(out["corr"], expected.corr_per_layer, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["depth"], expected.depth_per_layer, rtol=1e-5, atol=1e-5)
    found, wanted = gradients(model), gradients(reference)
    assert any("layernorm" in name and grad.any() for name, grad in wanted.items()) == (mode == "full")
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("group_bytes", [1, geometric.GROUP_BYTES], ids=["streamed", "grouped"])
def test_other_targets_can_be_left_out_of_the_negatives(config, family, plain_step, group_bytes):
    settings = config(family, loss={"other_targets": "ignored", "lm_weight": 0.0})
    losses = {}
    for other_targets in ("negatives", "ignored"):
        reference = build_model(settings, CPU).train()
        expected = plain_step(reference, batch_of(settings, reference), other_targets=other_targets)
        expected.loss.backward()
        losses[other_targets] = expected.loss.item()
    assert losses["negatives"] > losses["ignored"] + 1e-3  # the batch has anchors with several targets
    model = build_model(settings, CPU).train()
    model.supervision.by_layer.group_bytes = group_bytes
    out = model(**batch_of(settings, model))
    out["loss"].backward()
    torch.testing.assert_close(out["corr"], expected.corr_per_layer, rtol=1e-5, atol=1e-6)
    found = gradients(model)
    for name, grad in gradients(reference).items():
        torch.testing.assert_close(found[name], grad, rtol=2e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("group_bytes", [1, geometric.GROUP_BYTES], ids=["streamed", "grouped"])
def test_the_losses_of_the_layers_can_be_added_up(config, family, plain_step, group_bytes):
    settings = config(family, heads={"layers": "2-4"}, loss={"layer_reduction": "sum", "lm_weight": 0.0})
    reference, model = build_model(settings, CPU).train(), build_model(settings, CPU).train()
    expected = plain_step(reference, batch_of(settings, reference))
    total = (0.3 * expected.corr_per_layer + expected.depth_per_layer).sum()
    (3 * expected.loss).backward()
    model.supervision.by_layer.group_bytes = group_bytes
    out = model(**batch_of(settings, model))
    out["loss"].backward()
    torch.testing.assert_close(out["loss"], total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out["corr"], expected.corr_per_layer, rtol=1e-5, atol=1e-6)
    found = gradients(model)
    for name, grad in gradients(reference).items():
        torch.testing.assert_close(found[name], grad, rtol=2e-4, atol=5e-6, msg=name)


def test_geometry_alone_reaches_every_adapter_of_the_supervised_layers_and_below(config, family):
    model = build_model(config(family, heads={"layers": "3"}), CPU).train()
    model.lm_weight = 0.0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)  # at zero, as it starts, it hides lora_A from the gradient
    model(**batch_of(config(family), model))["loss"].backward()
    reached = {
        name: p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters() if "lora" in name
    }
    for layer in range(4):
        for projection in "qkvo":
            for factor in "AB":
                found = [
                    v for k, v in reached.items() if f"layers.{layer}.self_attn.{projection}_proj.lora_{factor}" in k
                ]
                assert found == [layer <= 2], (layer, projection, factor)
    heads = [p for name, p in model.named_parameters() if name.startswith("supervision.")]
    assert all(p.grad is not None and p.grad.any() for p in heads)


def test_a_batch_without_matches_gives_every_head_a_gradient_of_zero(config):
    settings = config(mixed=True, scenes={"root": ""})
    model = build_model(settings, CPU).train()
    out = model(**batch_of(settings, model))
    assert out["answers"] > 0 and out["lm"] > 0
    assert out["corr"].eq(0).all() and out["pck"].eq(0).all()
    out["loss"].backward()
    heads = [p for name, p in model.named_parameters() if name.startswith("supervision.")]
    assert heads and all(p.grad is not None and not p.grad.any() for p in heads)


def test_a_batch_without_answers_has_a_language_loss_of_zero(config, family):
    model = build_model(config(family), CPU).train()
    out = model(**batch_of(config(family), model))
    assert out["lm"] == 0 and out["answers"] == 0 and torch.isfinite(out["loss"])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_by_default_heads_and_loss_compute_in_the_type_of_the_model(config, monkeypatch, dtype):
    """A loss on fp32 embeddings would multiply in IEEE fp32 on a GPU."""
    seen = []

    def watched(embeddings, *args, **kwargs):
        compared = embeddings.duals[0] if isinstance(embeddings, InMetric) else embeddings
        seen.append((compared.dtype, compared is embeddings))
        return gasp_loss(embeddings, *args, **kwargs)

    monkeypatch.setattr(geometric, "gasp_loss", watched)
    settings = replace(config(model={"dtype": dtype}), heads=HeadsConfig())
    model = build_model(settings, CPU).train()
    model(**batch_of(settings, model))["loss"].backward()
    assert seen == [(DTYPES[dtype], dtype == "fp32")]  # one call for all layers; in bf16, by coordinates
    assert {layer.head.first.compute for layer in model.supervision.by_layer.values()} == {dtype}
    assert {p.dtype for p in model.supervision.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.supervision.parameters()} == {torch.float32}


def test_the_temperature_learns(config):
    settings = config(loss={"learnable_temperature": True, "lm_weight": 0.0})
    model = build_model(settings, CPU).train()
    batch, log_temperature = batch_of(settings, model), model.supervision.log_temperature

    def loss_at(shift):
        with torch.no_grad():
            log_temperature.add_(shift)
            value = model(**batch)["loss"].item()
            log_temperature.sub_(shift)
        return value

    model(**batch)["loss"].backward()
    slope = (loss_at(1e-2) - loss_at(-1e-2)) / 2e-2
    assert log_temperature.grad.item() == pytest.approx(slope, rel=2e-2)

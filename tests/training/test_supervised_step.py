"""Streamed supervision is the plain loss on the plain heads, in less memory, under every kind of checkpointing."""

import gc
import resource
import weakref
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

import gasp_fast.supervision.streamed as supervision_module
from gasp_fast.collator import Collator
from gasp_fast.loss.config import LossConfig
from gasp_fast.loss.matches import Matches
from gasp_fast.supervision.head_files import read_heads, write_heads
from gasp_fast.supervision.heads import CorrespondenceHead, CorrespondenceHeads
from gasp_fast.supervision.streamed import GeometricSupervision
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


def test_the_temperature_learns(config):
    settings = config()
    model = build_model(settings, CPU).train()
    heads = CorrespondenceHeads(
        {n: layer.head for n, layer in zip((0, 1, 2, 3), model.supervision.by_layer.values(), strict=True)}
    )
    model.supervision = GeometricSupervision(heads, LossConfig(learnable_temperature=True))
    model.lm_weight = 0.0
    batch = batch_of(settings, model)

    def loss_at(shift):
        with torch.no_grad():
            model.supervision.log_temperature.add_(shift)
            value = model(**batch)["loss"].item()
            model.supervision.log_temperature.sub_(shift)
        return value

    model(**batch)["loss"].backward()
    slope = (loss_at(1e-2) - loss_at(-1e-2)) / 2e-2
    assert model.supervision.log_temperature.grad.item() == pytest.approx(slope, rel=2e-2)


class States:
    """Hidden states that somebody captured."""

    def __init__(self, states):
        self.states = states

    def hidden(self, layer):
        return self.states[layer]


def synthetic_problem(layers, tokens=2048, hidden=64, out=256):
    torch.manual_seed(0)
    heads = CorrespondenceHeads({n: CorrespondenceHead(hidden, 512, out) for n in range(layers)})
    states = [torch.randn(1, tokens, hidden, requires_grad=True) for _ in range(layers)]
    half = tokens // 2
    matches = Matches(
        frame_offsets=torch.tensor([0, half, tokens]),
        anchor=torch.arange(64),
        target=torch.arange(64) + half,
        token_xy=torch.stack([torch.arange(tokens) % 32, torch.arange(tokens) % half // 32], 1),
    )
    return GeometricSupervision(heads), States(states), torch.arange(tokens), matches


def test_at_most_one_layers_activations_are_alive(monkeypatch):
    """Every head output is counted while it exists; a second one while the first still lives is one too many."""
    alive, most = set(), []
    real = supervision_module.gasp_loss

    def watched(embeddings, *args, **kwargs):
        key = id(embeddings)
        alive.add(key)
        weakref.finalize(embeddings, alive.discard, key)
        most.append(len(alive))
        return real(embeddings, *args, **kwargs)

    monkeypatch.setattr(supervision_module, "gasp_loss", watched)
    supervision, states, positions, matches = synthetic_problem(6)
    out = supervision(states, positions, matches)
    gc.collect()
    assert most == [1] * 6 and not alive
    out["loss"].backward()
    assert most == [1] * 6  # nothing was computed again


def _peaks():
    """Peak memory of the process after a supervised step on 1, 4 and 16 layers, all gradients kept, in that order."""
    peaks, kept = [], []
    for layers in (1, 4, 16):
        supervision, states, positions, matches = synthetic_problem(layers)
        for tensor in (*supervision.parameters(), *states.states):
            tensor.grad = torch.zeros_like(tensor)
        kept.append((supervision, states))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        supervision(states, positions, matches)["loss"].backward()
        peaks.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    return peaks


def test_peak_memory_is_flat_in_the_number_of_layers_apart_from_gradients():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        _, few, many = pool.submit(_peaks).result()
    activations = 2048 * (512 * 2 + 256) * 4  # of one layer: what would stay alive for each one
    gradients = (64 * 512 + 512 + 512 * 256 + 256 + 2048 * 64) * 4  # of one layer's weights and rows
    assert few + many < 16 * 2 * gradients + 3 * activations
    assert 16 * 2 * gradients < 4 * activations  # so the bound means something: 16 layers' activations do not fit it


def test_without_gradients_nothing_is_differentiated(monkeypatch):
    supervision, states, positions, matches = synthetic_problem(2, tokens=128)
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("differentiated"))
    with torch.no_grad():
        out = supervision(states, positions, matches)
    assert torch.isfinite(out["loss"]) and not out["loss"].requires_grad


def test_heads_come_back_from_their_file(tmp_path):
    heads = CorrespondenceHeads({3: CorrespondenceHead(16, 8, 4, "bf16"), 7: CorrespondenceHead(16, 5, 4, "bf16")})
    write_heads(tmp_path / "heads.safetensors", heads.state_dict(), "bf16")
    back = read_heads(tmp_path / "heads.safetensors")
    assert back.layers == [3, 7] and back.by_layer["7"].first.compute == "bf16"
    for name, tensor in heads.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])
    with pytest.raises(OSError, match="no such file"):
        read_heads(tmp_path / "nothing.safetensors")

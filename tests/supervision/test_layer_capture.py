"""Captured hidden states are those of the model, with their gradients, under every kind of gradient checkpointing."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gasp_fast.supervision.layer_capture import LayerCapture


def capture_of(family, layers=None):
    backbone, model = family.backbone, family.model
    return LayerCapture(backbone.decoder_layers(model), backbone.final_norm(model), layers)


def test_captured_states_are_the_models_hidden_states_before_the_final_norm(family, talk, noise):
    encoded = family.backbone.encode([talk(noise(2))])
    with capture_of(family) as capture, torch.no_grad():
        states = family.model(**encoded.inputs, output_hidden_states=True).hidden_states
    for layer in range(family.backbone.layer_count - 1):
        assert torch.equal(capture.hidden(layer), states[layer + 1])
    last = capture.hidden(family.backbone.layer_count - 1)
    assert not torch.equal(last, states[-1])
    with torch.no_grad():
        torch.testing.assert_close(family.backbone.final_norm(family.model)(last), states[-1])


def test_a_state_is_read_through_the_norm_that_follows_or_as_the_projections_read_it(family, talk, noise):
    encoded = family.backbone.encode([talk(noise(2))])
    positions, last = torch.cat(encoded.positions), family.backbone.layer_count - 1
    model = deepcopy(family.model)
    layers, final_norm = family.backbone.decoder_layers(model), family.backbone.final_norm(model)
    torch.manual_seed(0)
    for module in [*(layer.input_layernorm for layer in layers), final_norm]:
        module.weight.data.uniform_(0.5, 2)  # norms of a random model are all alike
    projected, handles = [], []
    for layer in layers:
        keep = layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: projected.append(args[0]))
        handles.append(keep)
    captures = [LayerCapture(layers, final_norm, read=read) for read in ("output_normed", "layer_input_normed")]
    with captures[0] as output, captures[1] as entering, torch.no_grad():
        final = model(**encoded.inputs, output_hidden_states=True).hidden_states[-1]
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for layer, (state, following) in enumerate(zip(projected, [*projected[1:], final], strict=True)):
            for capture, expected in ((entering, state), (output, following)):
                torch.testing.assert_close(capture.tokens(layer, positions), expected.flatten(0, 1)[positions])
    assert entering.norm(last) is layers[last].input_layernorm and output.norm(last) is final_norm
    assert capture_of(family).norm(last) is None


@pytest.fixture
def training(shipped):
    """A model in training mode. Gradient checkpointing is switched off afterwards."""
    model = shipped.model.train()
    model.enable_input_require_grads()
    yield shipped
    model.gradient_checkpointing_disable()
    model.disable_input_require_grads()
    model.zero_grad()
    model.eval()


def step(family, encoded, layers):
    """States and gradients of a loss that reads every captured layer, with the backward inside the context."""
    family.model.zero_grad()
    positions = torch.cat(encoded.positions)
    rng = torch.Generator().manual_seed(0)
    with capture_of(family, layers) as capture:
        loss = family.model(**encoded.inputs, use_cache=False).loss
        states = {layer: capture.tokens(layer, positions) for layer in layers}
        for layer in layers:
            loss = loss + (states[layer] * torch.randn(states[layer].shape, generator=rng)).mean()
        loss.backward()
        after = {layer: capture.tokens(layer, positions) for layer in layers}
    assert all(torch.equal(states[layer], after[layer]) and after[layer].requires_grad for layer in layers)
    grads = {name: p.grad.clone() for name, p in family.model.named_parameters() if p.grad is not None}
    return {layer: state.detach() for layer, state in states.items()}, grads


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_states_and_gradients_are_the_same_under_gradient_checkpointing(training, reentrant, talk, noise):
    encoded = training.backbone.encode([talk(noise(2, 64, 64)), talk(noise(2, 64, 64, seed=1))])
    layers = [0, 1, 3]
    states, grads = step(training, encoded, layers)
    training.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed_states, checkpointed_grads = step(training, encoded, layers)
    for layer in layers:
        assert torch.equal(states[layer], checkpointed_states[layer])
    assert grads.keys() == checkpointed_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(checkpointed_grads[name], grad, rtol=1e-5, atol=1e-7, msg=name)


class WholeCallsCheckpointed(nn.Module):
    """Checkpoints its layers as transformers did up to 5.18: hooks run inside, and again when it recomputes."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.norm(x)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_hooks_that_run_inside_the_checkpoint_and_twice_change_nothing(reentrant):
    results = []
    for mode in (None, reentrant):
        model, x = WholeCallsCheckpointed(mode), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
        positions = torch.tensor([1, 7])
        with LayerCapture(model.layers, model.norm) as capture:
            loss = model(x.requires_grad_()).sum()
            states = [capture.hidden(layer) for layer in capture.layers]
            weight = torch.arange(16.0).reshape(2, 8)
            loss = loss + sum((capture.tokens(layer, positions) * weight).sum() for layer in capture.layers)
            loss.backward()
            assert all(capture.hidden(layer) is state for layer, state in enumerate(states))
        results.append(([state.detach() for state in states], [p.grad for p in model.parameters()], x.grad))
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_a_loss_on_one_layer_reaches_the_layers_below_it_and_no_others(training, talk, noise):
    model, backbone = training.model, training.backbone
    encoded = backbone.encode([talk(noise(2, 64, 64))])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with capture_of(training, [1]) as capture:
        model(**encoded.inputs, use_cache=False)
        capture.tokens(1, torch.cat(encoded.positions)).square().sum().backward()
    touched = [any(p.grad is not None for p in layer.parameters()) for layer in backbone.decoder_layers(model)]
    assert touched == [True, True, False, False]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.decoder_layers(model)[0].parameters())


def test_nothing_is_captured_after_the_context_not_even_after_an_error(shipped, talk, noise):
    inputs = shipped.backbone.encode([talk(noise(1, 64, 64))]).inputs
    capture = capture_of(shipped)
    with pytest.raises(ZeroDivisionError), capture:
        1 / 0  # noqa: B018
    with torch.no_grad():
        shipped.model(**inputs)
        with pytest.raises(ValueError, match="no hidden state yet"):
            capture.hidden(0)
        with capture:
            shipped.model(**inputs)
        kept = capture.hidden(0)
        shipped.model(**shipped.backbone.encode([talk(noise(2, 64, 64))]).inputs)
    assert capture.hidden(0) is kept


def test_a_callback_receives_each_state_once_in_order_and_nothing_is_kept(shipped, talk, noise):
    inputs = shipped.backbone.encode([talk(noise(1, 64, 64))]).inputs
    layers, final_norm = shipped.backbone.decoder_layers(shipped.model), shipped.backbone.final_norm(shipped.model)
    received = []
    with torch.no_grad():
        with LayerCapture(layers, final_norm, [0, 2, 3]) as capture:
            shipped.model(**inputs)
        with LayerCapture(layers, final_norm, [0, 2, 3], lambda *state: received.append(state)) as streaming:
            shipped.model(**inputs)
    assert [layer for layer, _ in received] == [0, 2, 3]
    assert all(torch.equal(state, capture.hidden(layer)) for layer, state in received)
    with pytest.raises(ValueError, match="no hidden state yet"):
        streaming.hidden(0)


def test_a_second_forward_pass_needs_a_cleared_capture(shipped, talk, noise):
    first, second = (shipped.backbone.encode([talk(noise(n, 64, 64))]).inputs for n in (1, 2))
    with capture_of(shipped, [0]) as capture, torch.no_grad():
        shipped.model(**first)
        kept = capture.hidden(0)
        shipped.model(**second)
        assert capture.hidden(0) is kept
        capture.clear()
        shipped.model(**second)
        assert capture.hidden(0).shape[1] == second["input_ids"].shape[1] != kept.shape[1]


def test_tokens_picks_flat_positions_in_order(shipped, talk, noise):
    encoded = shipped.backbone.encode([talk(noise(1)), talk(noise(1, seed=1))])
    with capture_of(shipped, [2]) as capture, torch.no_grad():
        shipped.model(**encoded.inputs)
    picked = capture.tokens(2, torch.cat(encoded.positions))
    length = encoded.inputs["input_ids"].shape[1]
    for row, positions in zip((0, len(encoded.positions[0])), encoded.positions, strict=True):
        sequence, place = divmod(int(positions[0]), length)
        assert torch.equal(picked[row], capture.hidden(2)[sequence, place])


def test_wrong_layers_raise_an_error_that_names_them(shipped):
    with pytest.raises(ValueError, match="layers contains 4"):
        capture_of(shipped, [4])
    capture = capture_of(shipped, [1])
    with pytest.raises(ValueError, match="layer = 2 is not captured"):
        capture.hidden(2)
    with pytest.raises(ValueError, match="layer = 1 has no hidden state yet"):
        capture.hidden(1)

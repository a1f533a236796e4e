"""Supervision that is differentiated layer by layer keeps one layer in memory and computes nothing twice."""

import gc
import resource
import weakref
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

from gasp_fast.loss.config import LossConfig
from gasp_fast.loss.function import gasp_loss
from gasp_fast.loss.matches import Matches
from gasp_fast.supervision import geometric
from gasp_fast.supervision.geometric import GeometricSupervision
from gasp_fast.supervision.heads import CorrespondenceHead, CorrespondenceHeads


class CapturedStates:
    """Hidden states by layer, with the one method of `LayerCapture` that supervision uses."""

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
        target_depth=torch.linspace(1, 3, 64),
        patch_depth=torch.linspace(1, 4, tokens),
        token_xy=torch.stack([torch.arange(tokens) % 32, torch.arange(tokens) % half // 32], 1),
    )
    return GeometricSupervision(heads), CapturedStates(states), torch.arange(tokens), matches


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(),
        LossConfig(corr_weight=0.7, depth_weight=0.2, temperature=0.3, negatives="frame"),
        LossConfig(corr_weight=0.0, eps=0.5, backend="torch"),
    ],
)
def test_every_setting_of_the_loss_arrives_at_the_loss(config):
    supervision, states, positions, matches = synthetic_problem(2, tokens=256)
    heads = CorrespondenceHeads({int(name): layer.head for name, layer in supervision.by_layer.items()})
    supervision = GeometricSupervision(heads, config)
    out = supervision(states, positions, matches)
    expected = gasp_loss(
        [heads(layer, states.hidden(layer)[0]) for layer in heads.layers],
        matches,
        temperature=config.temperature,
        negatives=config.negatives,
        corr_weight=config.corr_weight,
        depth_weight=config.depth_weight,
        eps=config.eps,
        backend=config.backend,
    )
    torch.testing.assert_close(out["loss"], expected.loss)
    torch.testing.assert_close(out["corr"], expected.corr_per_layer)
    torch.testing.assert_close(out["depth"], expected.depth_per_layer)


def test_pck_is_not_a_number_where_tokens_have_no_place_on_a_grid():
    supervision, states, positions, matches = synthetic_problem(2, tokens=256)
    with_places = supervision(states, positions, matches)
    without = supervision(states, positions, replace(matches, token_xy=None))
    assert with_places["pck"].isfinite().all()
    assert without["pck"].shape == (2,) and without["pck"].isnan().all()
    assert torch.equal(with_places["loss"], without["loss"])


def test_at_most_one_layers_activations_are_alive(monkeypatch):
    """Head outputs are counted while they exist: there must never be two."""
    alive, counts = set(), []

    def watched(embeddings, *args, **kwargs):
        key = id(embeddings)
        alive.add(key)
        weakref.finalize(embeddings, alive.discard, key)
        counts.append(len(alive))
        return gasp_loss(embeddings, *args, **kwargs)

    monkeypatch.setattr(geometric, "gasp_loss", watched)
    supervision, states, positions, matches = synthetic_problem(6)
    out = supervision(states, positions, matches)
    gc.collect()
    assert counts == [1] * 6 and not alive
    out["loss"].backward()
    assert counts == [1] * 6  # nothing was computed again


def peaks_with_1_4_and_16_layers():
    """Growth of the process's peak memory by a supervised step on 1, 4 and 16 layers, in that order.

    All gradients exist before each measurement, and nothing is freed between them.
    """
    peaks, in_memory = [], []
    for layers in (1, 4, 16):
        supervision, states, positions, matches = synthetic_problem(layers)
        for tensor in (*supervision.parameters(), *states.states):
            tensor.grad = torch.zeros_like(tensor)
        in_memory.append((supervision, states))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        supervision(states, positions, matches)["loss"].backward()
        peaks.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    return peaks


def test_peak_memory_is_flat_in_the_number_of_layers_apart_from_gradients():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        _, few, many = pool.submit(peaks_with_1_4_and_16_layers).result()
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

"""Supervision that is differentiated in groups of layers keeps one group in memory and computes nothing twice."""

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
    """Hidden states by layer, with the two methods of `LayerCapture` that supervision uses."""

    def __init__(self, states):
        self.states = states

    def hidden(self, layer, read=None):
        return self.states[layer]

    def norm(self, layer, read=None):
        return None


def synthetic_problem(layers, tokens=2048, hidden=64, out=256, compute="fp32", **options):
    torch.manual_seed(0)
    heads = CorrespondenceHeads({n: CorrespondenceHead(hidden, 512, out, compute) for n in range(layers)})
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
    return GeometricSupervision(heads, **options), CapturedStates(states), torch.arange(tokens), matches


def layer_bytes(tokens=2048, hidden=64, out=256):
    """Of the hidden rows and the embeddings of one layer of a `synthetic_problem`."""
    return tokens * (hidden + out) * 4


@pytest.fixture
def calls(monkeypatch):
    """The shape and type of the embeddings in each call of the loss."""
    seen = []

    def watched(embeddings, *args, **kwargs):
        layers = embeddings if isinstance(embeddings, list) else embeddings.unbind()
        seen.append((len(layers), *layers[0].shape, layers[0].dtype))
        return gasp_loss(embeddings, *args, **kwargs)

    monkeypatch.setattr(geometric, "gasp_loss", watched)
    return seen


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


@pytest.mark.parametrize(
    ("group_bytes", "sizes"),
    [
        (1, [1] * 7),
        (2 * layer_bytes(256) - 1, [1] * 7),
        (2 * layer_bytes(256), [2, 2, 2, 1]),
        (5 * layer_bytes(256), [4, 3]),  # as equal as possible
        (7 * layer_bytes(256), [7]),
    ],
)
def test_as_many_layers_share_a_call_of_the_loss_as_fit_the_budget(calls, group_bytes, sizes):
    supervision, states, positions, matches = synthetic_problem(7, tokens=256, group_bytes=group_bytes)
    supervision(states, positions, matches)["loss"].backward()
    assert [count for count, *_ in calls] == sizes
    calls.clear()
    with torch.no_grad():
        supervision(states, positions, matches)
    assert [count for count, *_ in calls] == sizes


@pytest.mark.parametrize(
    ("tokens", "width", "layers", "sizes"), [(16 * 144, 4096, 19, [10, 9]), (24 * 576, 3584, 2, [1, 1])]
)
def test_short_sequences_share_calls_by_default_and_long_ones_do_not(calls, tokens, width, layers, sizes):
    _, _, positions, matches = synthetic_problem(1, tokens=tokens, hidden=1)
    heads = CorrespondenceHeads({n: CorrespondenceHead(width, 1, width) for n in range(layers)})
    states = CapturedStates([torch.randn(1, tokens, 1).bfloat16().expand(1, tokens, width)] * layers)
    with torch.no_grad():
        GeometricSupervision(heads, embeddings=torch.bfloat16)(states, positions, matches)
    assert [count for count, *_ in calls] == sizes


@pytest.mark.parametrize("negatives", ["sequence", "frame"])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize(
    ("compute", "embeddings", "rounding"),
    [("fp32", None, 1e-6), ("fp32", torch.bfloat16, 1e-2), ("bf16", None, 1e-2)],
)
def test_a_group_has_the_losses_and_gradients_of_its_layers_one_by_one(
    compute, embeddings, rounding, negatives, backend
):
    results = []
    for group_bytes in (1, 3 * layer_bytes(256)):
        config = LossConfig(negatives=negatives, backend=backend)
        supervision, states, positions, matches = synthetic_problem(
            5, tokens=256, compute=compute, config=config, learnable_temperature=True, embeddings=embeddings,
            group_bytes=group_bytes,
        )  # fmt: skip
        for state in states.states[::2]:
            state.requires_grad_(False)  # as below the lowest adapter
        out = supervision(states, positions[:256], matches)
        (3 * out["loss"]).backward()
        results.append((out, [tensor.grad for tensor in (*states.states, *supervision.parameters())]))
    (alone, alone_gradients), (together, together_gradients) = results
    torch.testing.assert_close(together["loss"], alone["loss"], rtol=1e-6, atol=0)
    for term in ("corr", "depth", "pck"):  # the same bits of each layer, where layers are computed one by one
        if backend == "cpp":
            assert torch.equal(together[term], alone[term])
        torch.testing.assert_close(together[term], alone[term], rtol=1e-6, atol=1e-6)
    for ours, reference in zip(together_gradients, alone_gradients, strict=True):
        assert (ours is None) == (reference is None)
        if ours is not None:
            assert reference.any() and (ours - reference).norm() < rounding * reference.norm()


def test_neighbours_with_embeddings_of_different_width_do_not_share_a_call(calls):
    sizes = (8, 8, 16, 8)
    heads = CorrespondenceHeads({n: CorrespondenceHead(64, 32, size) for n, size in enumerate(sizes)})
    _, states, positions, matches = synthetic_problem(4, tokens=256)
    out = GeometricSupervision(heads)(states, positions, matches)
    assert [(count, width) for count, _, width, _ in calls] == [(2, 8), (1, 16), (1, 8)]
    assert out["corr"].shape == (4,)
    alone = [GeometricSupervision(CorrespondenceHeads({n: heads.by_layer[str(n)]})) for n in range(4)]
    expected = [one(states, positions, matches)["corr"] for one in alone]
    torch.testing.assert_close(out["corr"], torch.cat(expected))


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("embeddings", [torch.float32, torch.bfloat16])
def test_the_loss_takes_embeddings_of_the_chosen_type_and_weights_stay_fp32(calls, compute, embeddings):
    supervision, states, positions, matches = synthetic_problem(2, tokens=256, compute=compute, embeddings=embeddings)
    supervision(states, positions, matches)["loss"].backward()
    assert {dtype for *_, dtype in calls} == {embeddings}
    assert {p.grad.dtype for p in supervision.parameters()} == {torch.float32}


def test_no_tokens_give_every_weight_a_gradient_of_zero():
    supervision, states, _, matches = synthetic_problem(3, tokens=256, learnable_temperature=True)
    none = torch.zeros(0, dtype=torch.int64)
    matches = Matches(frame_offsets=torch.tensor([0, 0]), anchor=none, target=none)
    out = supervision(states, none, matches)
    out["loss"].backward()
    assert out["loss"] == 0 and out["corr"].shape == (3,)
    assert all(p.grad is not None and not p.grad.any() for p in supervision.parameters())


def test_at_most_one_groups_activations_are_alive(monkeypatch):
    """Embeddings are counted while they exist: there must never be those of two groups."""
    alive, counts = set(), []

    def watched(embeddings, *args, **kwargs):
        key = id(embeddings)
        alive.add(key)
        weakref.finalize(embeddings, alive.discard, key)
        counts.append(len(alive))
        return gasp_loss(embeddings, *args, **kwargs)

    monkeypatch.setattr(geometric, "gasp_loss", watched)
    supervision, states, positions, matches = synthetic_problem(6, group_bytes=2 * layer_bytes())
    out = supervision(states, positions, matches)
    gc.collect()
    assert counts == [1] * 3 and not alive
    out["loss"].backward()
    assert counts == [1] * 3  # nothing was computed again


def peaks_with_1_4_and_16_layers():
    """Growth of the process's peak memory by a supervised step on 1, 4 and 16 layers, in that order, one in a group.

    All gradients exist before each measurement, and nothing is freed between them.
    """
    peaks, in_memory = [], []
    for layers in (1, 4, 16):
        supervision, states, positions, matches = synthetic_problem(layers, group_bytes=layer_bytes())
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

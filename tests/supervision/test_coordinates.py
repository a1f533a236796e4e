"""A head's coordinates in their metric are its embeddings, for every inner product and every gradient."""

import copy

import pytest
import torch
from support.problems import relative_error

import gasp_fast
from gasp_fast.loss.naive import naive_loss
from gasp_fast.supervision import heads
from gasp_fast.supervision.geometric import GeometricSupervision, SupervisedLayer
from gasp_fast.supervision.heads import CorrespondenceHead, CorrespondenceHeads
from gasp_fast.supervision.similarity import mean_cosines

HIDDEN, MID, OUT, TOKENS = 48, 31, 128, 160
BF16 = torch.bfloat16


def problem(centred, tokens=TOKENS):
    """A head, hidden states and matches. `centred`: the mean of all embeddings is near zero, as after training."""
    torch.manual_seed(0)
    head = CorrespondenceHead(HIDDEN, MID, OUT, "bf16")
    spectrum = torch.linspace(1, 0, MID).exp2().pow(5)  # of W, from 32 to 1
    with torch.no_grad():
        head.second.weight.copy_(torch.linalg.qr(torch.randn(OUT, MID))[0] * spectrum)
        head.first.weight.mul_(4)
    half = tokens // 2
    hidden = torch.randn(tokens, HIDDEN) + 2 * torch.randn(HIDDEN)
    hidden[half:] = hidden[:half] + 0.5 * torch.randn(half, HIDDEN)
    hidden = hidden.bfloat16()
    if centred:
        with torch.no_grad():
            head.second.bias.sub_(head(hidden).float().mean(0))
    matches = gasp_fast.Matches(
        frame_offsets=torch.tensor([0, half, tokens]),
        anchor=torch.arange(half),
        target=torch.arange(half) + half,
        target_depth=torch.full((half,), 9.0),  # larger than every expected depth: no sign depends on rounding
        patch_depth=torch.linspace(1, 4, tokens),
        token_xy=torch.stack([torch.arange(tokens) % 8, torch.arange(tokens) // 8], 1),
    )
    return head, hidden, matches


def gradients(loss, head, hidden):
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, *head.parameters()])]


def truth(head, hidden, matches):
    """The loss of the head with its weights rounded as its products round them, in float64, and its gradients."""
    head, hidden = copy.deepcopy(head).double(), hidden.double().requires_grad_()
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(weight.bfloat16())
    h = torch.nn.functional.gelu(hidden @ head.first.weight.mT + head.first.bias)
    e = h @ head.second.weight.mT + head.second.bias
    return gradients(naive_loss(e[None], matches).loss, head, hidden), e.detach()


def of_route(head, hidden, matches, coordinates, monkeypatch, backend="cpp"):
    hidden = hidden.detach().clone().requires_grad_()
    monkeypatch.setattr(heads, "WIDER", 1.5 if coordinates else 1e9)
    compared = SupervisedLayer(0, head, "output", None)(hidden)
    assert (compared.metric is not None) == coordinates
    embeddings = compared.embeddings
    if compared.metric is not None:
        embeddings = gasp_fast.in_metric(embeddings, compared.metric)
    out = gasp_fast.gasp_loss(embeddings, matches, backend=backend)
    return gradients(out.loss, head, hidden), mean_cosines(embeddings, matches)


@pytest.mark.parametrize("centred", [False, True])
def test_coordinates_have_the_inner_products_of_the_embeddings(centred):
    head, hidden, matches = problem(centred)
    _, e = truth(head, hidden, matches)
    x, metric = head.coordinates(hidden)
    assert x.dtype == metric.dtype == BF16 and x.shape == (TOKENS, 32) and metric.shape == (32, 32)
    x, metric = x.double(), metric.double()
    norms = e.norm(dim=1)
    assert ((x @ metric @ x.mT - e @ e.mT).abs() / (norms[:, None] * norms)).max() < 0.03


@pytest.mark.parametrize("centred", [False, True])
def test_gradients_by_coordinates_are_as_exact_as_by_embeddings(monkeypatch, centred):
    head, hidden, matches = problem(centred)
    exact, e = truth(head, hidden, matches)
    ours, cosine = of_route(head, hidden, matches, True, monkeypatch)
    usual, usual_cosine = of_route(head, hidden, matches, False, monkeypatch)
    for name, a, b, c in zip(["loss", "hidden", "W1", "b1", "W2", "b2"], ours, usual, exact, strict=True):
        assert relative_error(a, c) <= 2 * relative_error(b, c) + torch.finfo(BF16).eps, name
    unit = torch.nn.functional.normalize(e, dim=1)
    expected = (unit.sum(0).square().sum() - TOKENS) / (TOKENS * (TOKENS - 1))
    assert abs(float(cosine - expected)) < 0.01 and abs(float(cosine - usual_cosine)) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("centred", [False, True])
def test_gradients_by_coordinates_are_as_exact_on_a_gpu(monkeypatch, centred):
    head, hidden, matches = problem(centred, tokens=1536)
    exact, _ = truth(head, hidden, matches)
    on_gpu = copy.deepcopy(head).cuda(), hidden.cuda(), matches.to("cuda")
    ours, _ = of_route(*on_gpu, True, monkeypatch, "triton")
    usual, _ = of_route(*on_gpu, False, monkeypatch, "triton")
    for name, a, b, c in zip(["loss", "hidden", "W1", "b1", "W2", "b2"], ours, usual, exact, strict=True):
        assert relative_error(a.cpu(), c) <= 2 * relative_error(b.cpu(), c) + torch.finfo(BF16).eps, name


def test_supervision_by_coordinates_is_supervision_by_embeddings(monkeypatch):
    """All that it returns, of layers that share a call."""
    head, hidden, matches = problem(centred=True)
    results = []
    for wider in (1.5, 1e9):
        monkeypatch.setattr(heads, "WIDER", wider)
        both = CorrespondenceHeads({0: copy.deepcopy(head), 1: copy.deepcopy(head)})
        supervision = GeometricSupervision(both, learnable_temperature=True)
        states = [hidden.clone()[None].requires_grad_() for _ in range(2)]
        capture = supervision.capture([torch.nn.Identity()] * 2, torch.nn.Identity())
        monkeypatch.setattr(type(capture), "hidden", lambda self, layer, read=None, states=states: states[layer])
        out = supervision(capture, torch.arange(TOKENS), matches)
        out["loss"].backward()
        results.append((out, states[1].grad, supervision.log_temperature.grad))
    (ours, of_state, of_temperature), (usual, of_usual_state, of_usual_temperature) = results
    for name in ("loss", "corr", "depth", "cosine"):
        torch.testing.assert_close(ours[name], usual[name], rtol=1e-2, atol=1e-2)
    assert (ours["pck"] - usual["pck"]).abs().max() <= 2 / len(matches)
    assert relative_error(of_state, of_usual_state) < 0.05
    assert relative_error(of_temperature, of_usual_temperature) < 0.05


def test_no_tokens_give_every_weight_a_gradient_of_zero():
    head, hidden, _ = problem(centred=False)
    none = gasp_fast.Matches(
        frame_offsets=torch.tensor([0, 0]), anchor=torch.tensor([], dtype=torch.int64),
        target=torch.tensor([], dtype=torch.int64),
    )  # fmt: skip
    hidden = hidden[:0].requires_grad_()
    loss = gasp_fast.gasp_loss(gasp_fast.in_metric(*head.coordinates(hidden)), none).loss
    for gradient in gradients(loss, head, hidden):
        assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("compute", "embeddings", "out", "expected"),
    [("bf16", None, 128, True), ("bf16", BF16, 48, True), ("bf16", None, 47, False), ("fp32", None, 128, False),
     ("bf16", torch.float32, 128, False), ("tf32", BF16, 128, False)],
)  # fmt: skip
def test_coordinates_serve_wide_heads_in_bf16(compute, embeddings, out, expected):
    layer = SupervisedLayer(0, CorrespondenceHead(HIDDEN, MID, out, compute), "output", embeddings)
    assert layer.compares_coordinates is expected
    assert layer.width == (32 if expected else out)
    enough = 96 if out == 48 else 43  # 48 x 32 / (48 - 32), 128 x 32 / (128 - 32)
    assert layer(torch.randn(enough, HIDDEN)).embeddings.shape == (1, enough, layer.width)
    assert layer(torch.randn(enough - 1, HIDDEN)).embeddings.shape == (1, enough - 1, out)


def test_coordinates_as_wide_as_a_neighbours_embeddings_have_a_call_of_their_own():
    _, hidden, matches = problem(centred=False)
    both = {0: CorrespondenceHead(HIDDEN, MID, OUT, "bf16"), 1: CorrespondenceHead(HIDDEN, 40, 32, "bf16")}
    supervision = GeometricSupervision(CorrespondenceHeads(both))
    assert {layer.width for layer in supervision.by_layer.supervised} == {32}
    capture = supervision.capture([torch.nn.Identity()] * 2, torch.nn.Identity())
    capture.hidden = lambda layer, read=None: hidden[None]
    assert supervision(capture, torch.arange(TOKENS), matches)["corr"].shape == (2,)

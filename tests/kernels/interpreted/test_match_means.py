"""Means of terms and metrics, in one pass, against PyTorch."""

import pytest
import torch
from support.problems import random_problem

import gasp_fast
from gasp_fast.kernels import match_means as module
from gasp_fast.kernels.chunk import MatchTerms
from gasp_fast.kernels.match_means import match_means

RADIUS = 2


def expected(terms, target, shares, xy, target_xy):
    corr_share, depth_share = (share.double() for share in shares)
    hit = (terms.best == target).double()
    near = torch.zeros_like(hit)
    if xy is not None:
        near = ((xy[terms.best.clamp(min=0)] - target_xy).long().square().sum(-1) <= RADIUS**2).double()
    values = (terms.corr.double() * corr_share, terms.depth.double() * depth_share, hit * corr_share,
              near * corr_share, terms.confidence.double() * corr_share)  # fmt: skip
    return torch.stack([value.sum(1) for value in values], 1)


@pytest.mark.parametrize(("layers", "matches"), [(1, 1), (3, 2048), (2, 5000), (1, 150_000), (2, 0)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("places", [None, torch.int64, torch.int32])
def test_means_are_those_of_pytorch(device, poisoned_memory, layers, matches, weighted, places):
    generator = torch.Generator().manual_seed(0)
    tokens = 400
    terms = MatchTerms(
        torch.randn(layers, matches, generator=generator), torch.rand(layers, matches, generator=generator),
        torch.randint(-1, tokens, (layers, matches), generator=generator),
        torch.rand(layers, matches, generator=generator),
    )  # fmt: skip
    target = torch.where(torch.rand(matches, generator=generator) < 0.3, terms.best[0], 7)
    size = matches if weighted else 1
    shares = tuple(torch.rand(size, generator=generator, dtype=torch.float64) / max(1, matches) for _ in range(2))
    xy = None if places is None else torch.randint(0, 20, (tokens, 2), generator=generator).to(places)
    target_xy = None if xy is None else xy[target.clamp(min=0)]
    truth = expected(terms, target, shares, xy, target_xy)

    def moved(value):
        return None if value is None else value.to(device)

    found = match_means(
        MatchTerms(*map(moved, terms)), moved(target), tuple(map(moved, shares)), moved(xy), moved(target_xy), RADIUS
    )
    torch.testing.assert_close(found.cpu().double(), truth, rtol=2e-6, atol=1e-7)


def test_a_nan_reaches_its_mean_and_no_other(device):
    terms = MatchTerms(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3))
    terms.corr[1, 2] = float("nan")
    share = torch.full((1,), 1 / 3, dtype=torch.float64, device=device)
    found = match_means(
        MatchTerms(*(t.to(device) for t in terms)), torch.zeros(3, dtype=torch.int64, device=device), (share, share),
        None, None, RADIUS,
    ).cpu()  # fmt: skip
    assert found[1, 0].isnan() and found.isnan().sum() == 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_reports_what_the_dense_backend_reports(device, monkeypatch, reduction, weighted):
    problem = random_problem(3, [[6, 4], [5, 3, 2]], width=8, matches=20, weighted=weighted)
    launched = []
    launch = module.launch
    monkeypatch.setattr(
        module, "launch", lambda kernel, *rest, **more: launched.append(1) or launch(kernel, *rest, **more)
    )
    grid = torch.stack([torch.arange(20) % 5, torch.arange(20) // 5], 1)
    matches = problem.matches
    object.__setattr__(matches, "token_xy", grid)
    outs, grads = [], []
    for backend in ("triton", "torch"):
        leaf = problem.embeddings.float().to(device).requires_grad_()
        out = gasp_fast.gasp_loss(leaf, matches.to(device), reduction=reduction, return_metrics=True, backend=backend)
        (out.corr.sum() * 2 + out.depth.sum()).backward()  # means differentiated by themselves
        outs.append([out.corr_per_layer, out.depth_per_layer, out.corr, out.depth, out.metrics.accuracy,
                     out.metrics.pck, out.metrics.confidence])  # fmt: skip
        grads.append(leaf.grad)
    assert len(launched) == 2
    for ours, theirs in zip(*outs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)

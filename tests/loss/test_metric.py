"""`in_metric`: the loss of longer vectors, from their coordinates."""

import pytest
import torch
from support.allocations import allocations
from support.problems import random_problem, relative_error
from torch.utils.checkpoint import checkpoint

import gasp_fast
from gasp_fast.kernels.engines import CPU_WORKSPACE

BACKENDS = ["torch", "cpp"]


def drawn(dtype=torch.float32, layers=2, **options):
    """Coordinates [L, N, 12], a matrix [L, 40, 12] that makes vectors of them, and matches."""
    problem = random_problem(0, [[30, 7, 1, 22], [18, 25, 9]], width=12, matches=40, layers=layers, **options)
    weight = torch.randn(layers, 40, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (problem.embeddings, weight)], problem.matches


def loss_of(x, weight, matches, backend="cpp", **options):
    return gasp_fast.gasp_loss(gasp_fast.in_metric(x, weight.mT @ weight), matches, backend=backend, **options).loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_is_the_loss_of_the_longer_vectors(backend, reduction):
    (x, weight), matches = drawn()
    loss = loss_of(x, weight, matches, backend, reduction=reduction).sum()
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    truth = gasp_fast.naive_loss(wide[0] @ wide[1].mT, matches, reduction=reduction).loss.sum()
    assert relative_error(loss, truth) < 1e-5
    found, true = (torch.autograd.grad(of, leaves) for of, leaves in ((loss, (x, weight)), (truth, wide)))
    for ours, theirs in zip(found, true, strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_gradients_are_those_of_finite_differences():
    (x, weight), matches = drawn(torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: loss_of(x, w, matches, "torch"), (x, weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_may_be_a_stack_a_list_or_one(backend):
    (x, weight), matches = drawn()
    metric = weight.mT @ weight

    def loss(embeddings, metrics):
        return gasp_fast.gasp_loss(gasp_fast.in_metric(embeddings, metrics), matches, backend=backend).loss

    stack = loss(x, metric)
    for of_list in (loss(list(x), list(metric)), loss(list(x), metric)):
        torch.testing.assert_close(of_list, stack)
    torch.testing.assert_close((loss(x[0], metric[0]) + loss(x[1], metric[1])) / 2, stack)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_where_asked(backend):
    (x, weight), matches = drawn()
    both = torch.autograd.grad(loss_of(x, weight, matches, backend), (x, weight))
    for at, leaves in enumerate(((x, weight.detach()), (x.detach(), weight))):
        (alone,) = torch.autograd.grad(loss_of(*leaves, matches, backend), leaves[at])
        torch.testing.assert_close(alone, both[at])
    with torch.no_grad():
        torch.testing.assert_close(loss_of(x, weight, matches, backend), loss_of(x, weight, matches, backend).detach())


def test_gradients_under_checkpointing_autocast_and_a_second_backward_are_the_same():
    (x, weight), matches = drawn()
    loss = loss_of(x, weight, matches)
    plain = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (x, weight))
    through = torch.autograd.grad(checkpoint(loss_of, x, weight, matches, use_reentrant=False), (x, weight))
    metric = (weight.mT @ weight).detach()
    with torch.autocast("cpu", torch.bfloat16):
        cast = gasp_fast.gasp_loss(gasp_fast.in_metric(x, metric), matches, backend="cpp").loss
    torch.testing.assert_close(cast, loss)
    torch.testing.assert_close(torch.autograd.grad(cast, x)[0], plain[0])
    for a, b, c in zip(plain, again, through, strict=True):
        torch.testing.assert_close(3 * a, b)
        assert torch.equal(a, c)


def test_compiled_gradients_are_the_eager_ones():
    """Not to the last bit: the products that make duals and gradients are torch's, outside of our operators."""
    (x, weight), matches = drawn()
    eager = torch.autograd.grad(loss_of(x, weight, matches), (x, weight))
    compiled = torch.autograd.grad(torch.compile(loss_of, fullgraph=True)(x, weight, matches), (x, weight))
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(eager, compiled, strict=True))


def test_a_second_derivative_is_refused():
    (x, weight), matches = drawn()
    with pytest.raises(RuntimeError, match="backend='torch'"):
        torch.autograd.grad(loss_of(x, weight, matches), x, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_row_stays_finite_and_a_nan_reaches_the_loss(backend, dtype):
    (x, weight), matches = drawn(dtype)
    metric = (weight.mT @ weight).detach().requires_grad_()
    anchor = int(matches.anchor[0])
    for value in (0.0, float("nan")):
        rows = x.detach().clone()
        rows[1, anchor] = value
        rows.requires_grad_()
        out = gasp_fast.gasp_loss(gasp_fast.in_metric(rows, metric), matches, backend=backend)
        assert out.corr_per_layer.isnan().tolist() == [False, value != 0]
        if value == 0:
            assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.loss, (rows, metric)))


def test_no_tensor_of_anchor_times_token_size():
    tokens, width = 1 << 13, 64
    problem = random_problem(0, [[1024] * 8], layers=2, width=width, matches=tokens)
    anchors = problem.matches.index.rows.row_token.shape[0]
    x = problem.embeddings.float().requires_grad_()
    metric = torch.eye(width).repeat(2, 1, 1).requires_grad_()

    def work():
        gasp_fast.gasp_loss(gasp_fast.in_metric(x, metric), problem.matches).loss.backward()

    work()  # allocates what is allocated only once
    largest, peak = allocations(work)
    assert largest < anchors * tokens  # bytes: not even one byte for each pair
    statistics = anchors * 8 * 4 * 8
    # Duals, coefficients, gradients, the sums of these with those of the call before.
    assert peak - statistics - 6 * x.nbytes <= (CPU_WORKSPACE << 20) + (8 << 20)


def test_the_module_takes_it():
    (x, weight), matches = drawn()
    compared = gasp_fast.in_metric(x, weight.mT @ weight)
    assert torch.equal(gasp_fast.GaspLoss()(compared, matches).loss, gasp_fast.gasp_loss(compared, matches).loss)


X, G = torch.zeros(2, 9, 16), torch.eye(16).repeat(2, 1, 1)


@pytest.mark.parametrize(
    ("x", "metric", "kind", "message"),
    [
        (X, G[:1], ValueError, "metric has 1 tensor(s) with shape [1, 16, 16]; these embeddings need 1 with shape [2,"),
        (X, G[..., :8], ValueError, "shape [2, 16, 8]"),
        (list(X), [G[0]], ValueError, "metric has 1 tensor(s) with shape [16, 16]; these embeddings need 2"),
        (X.half(), G, TypeError, "embeddings has dtype float16"),
        (X, None, TypeError, "metric is a NoneType"),
        (X, G.int(), TypeError, "metric has dtype torch.int32"),
        (X.int(), G, TypeError, "embeddings has dtype torch.int32"),
    ],
)
def test_wrong_arguments_are_named(x, metric, kind, message):
    with pytest.raises(kind) as error:
        gasp_fast.in_metric(x, metric)
    assert message in str(error.value)


def test_keys_and_frame_match_are_refused():
    (x, weight), matches = drawn()
    compared = gasp_fast.in_metric(x, weight.mT @ weight)
    with pytest.raises(ValueError, match="embeddings is in a metric, and keys is given"):
        gasp_fast.gasp_loss(compared, matches, keys=x)
    with pytest.raises(TypeError, match="in_metric"):
        gasp_fast.frame_match(compared, matches.anchor, matches.frame_offsets)

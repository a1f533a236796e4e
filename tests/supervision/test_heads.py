"""Correspondence heads: their start from W_Q, their precision, their gradients."""

import pytest
import torch
from torch import nn

from gasp_fast.supervision import precision
from gasp_fast.supervision.heads import CorrespondenceHead, CorrespondenceHeads, HeadsConfig, parse_layers

# outputs x hidden of W_Q: square, narrow query heads, wide query heads
SHAPES = [(48, 48), (32, 48), (64, 40)]


def linear(head: CorrespondenceHead, x: torch.Tensor) -> torch.Tensor:
    """The head with its GELU taken out, in float64."""
    head = head.double()
    inner = x @ head.first.weight.mT + head.first.bias
    return inner @ head.second.weight.mT + head.second.bias


def best_approximation(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """Independent of the SVD the head uses: project on the leading eigenvectors of W W^T."""
    vectors = torch.linalg.eigh(weight @ weight.mT).eigenvectors[:, -rank:]
    return vectors @ vectors.mT @ weight


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("outputs, hidden", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mid", [1, 7, 24])
def test_without_its_gelu_the_head_is_the_best_rank_r_approximation(outputs, hidden, biased, mid):
    torch.manual_seed(mid)
    weight, x = torch.randn(outputs, hidden), torch.randn(100, hidden, dtype=torch.float64)
    bias = torch.randn(outputs) if biased else None
    head = CorrespondenceHead.from_query_projection(weight, bias, mid_size=mid)
    expected = x @ best_approximation(weight.double(), mid).mT + (bias.double() if biased else 0)
    assert relative(linear(head, x), expected) < 2e-7


@pytest.mark.parametrize("outputs, hidden", SHAPES)
def test_a_mid_size_above_the_rank_is_exact_and_every_weight_can_learn(outputs, hidden):
    torch.manual_seed(0)
    weight, x = torch.zeros(outputs, hidden), torch.randn(100, hidden)
    weight[3:8] = torch.randn(5, hidden)  # of rank 5 without rounding
    head = CorrespondenceHead.from_query_projection(weight, mid_size=20)
    assert relative(linear(head, x.double()), x.double() @ weight.double().mT) < 2e-6
    head = CorrespondenceHead.from_query_projection(weight, mid_size=20)
    (head(x) * torch.randn(100, outputs)).sum().backward()
    # The surplus rows are as large as any fresh layer's, so the zero columns behind them receive a gradient at once.
    fresh = nn.Linear(hidden, 15).weight.std().item()
    assert head.first.weight[5:].std().item() == pytest.approx(fresh, rel=0.1)
    assert (head.second.weight[:, 5:] == 0).all()
    assert head.second.weight.grad.abs().amin() > 0


def test_a_narrow_embedding_compares_like_the_best_approximation_of_its_rank():
    torch.manual_seed(0)
    weight, x = torch.randn(48, 48), torch.randn(60, 48, dtype=torch.float64)
    head = CorrespondenceHead.from_query_projection(weight, mid_size=24, out_size=12)
    ours = linear(head, x)
    reference = x @ best_approximation(weight.double(), 12).mT
    assert ours.shape == (60, 12)
    assert relative(ours @ ours.mT, reference @ reference.mT) < 2e-6


def test_a_narrow_embedding_carries_the_bias_in_its_own_directions():
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 48), torch.randn(48)
    leading = torch.linalg.eigh((weight @ weight.mT).double()).eigenvectors[:, -12:]
    x = torch.randn(60, 48, dtype=torch.float64)
    projected = (x @ weight.double().mT + bias.double()) @ leading  # the full projection seen in 12 directions
    ours = linear(CorrespondenceHead.from_query_projection(weight, bias, mid_size=24, out_size=12), x)
    assert relative(ours @ ours.mT, projected @ projected.mT) < 2e-6


@pytest.mark.parametrize("outputs, hidden", SHAPES)
@pytest.mark.parametrize("mid, out", [(24, None), (16, 12)])
def test_the_head_is_that_of_the_svd_with_signs_that_do_not_depend_on_a_library(outputs, hidden, mid, out):
    torch.manual_seed(1)
    weight = torch.randn(outputs, hidden)
    head = CorrespondenceHead.from_query_projection(weight, mid_size=mid, out_size=out)
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    largest = u.abs().argmax(0)
    signs = u[largest, torch.arange(len(s))].sign()
    u, vt, root = u * signs, vt * signs[:, None], s.sqrt()
    second = (u if out is None else torch.eye(out, len(s)).double()) * root
    torch.testing.assert_close(head.first.weight.double(), root[:mid, None] * vt[:mid], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(head.second.weight.double(), second[:, :mid], rtol=1e-6, atol=1e-7)


def test_small_singular_values_keep_their_precision():
    """They are found beside ones a million times as large, although eigenvalues are their squares."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(40, 40).double()).Q for _ in range(2))
    values = torch.logspace(0, -6.5, 40).double()
    weight = (left * values) @ right.mT
    head = CorrespondenceHead.from_query_projection(weight, mid_size=40).double()
    torch.testing.assert_close(head.first.weight.square().sum(1), values, rtol=1e-6, atol=0)
    assert relative(head.second.weight @ head.first.weight, weight) < 1e-6


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_precisions_follow_the_model_unless_they_are_given(dtype):
    assert HeadsConfig().precisions(dtype) == (dtype, dtype)
    assert HeadsConfig(compute="tf32").precisions(dtype) == ("tf32", dtype)
    assert HeadsConfig(embeddings="fp32").precisions(dtype) == (dtype, "fp32")


def test_default_sizes_are_those_of_the_paper():
    head = CorrespondenceHead(64)
    assert (head.first.weight.shape, head.second.weight.shape) == ((32, 64), (64, 32))
    head = CorrespondenceHead.from_query_projection(torch.randn(48, 64))
    assert (head.first.weight.shape, head.second.weight.shape) == ((32, 64), (48, 32))


def test_the_head_is_linear_gelu_linear():
    torch.manual_seed(0)
    head, x = CorrespondenceHead(16, 12, 10), torch.randn(3, 5, 16)
    expected = nn.functional.linear(
        nn.functional.gelu(nn.functional.linear(x, head.first.weight, head.first.bias)),
        head.second.weight,
        head.second.bias,
    )
    torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize("compute, dtype", [("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_stay_fp32_and_the_product_runs_as_chosen_even_under_autocast(compute, dtype):
    torch.manual_seed(0)
    head, x = CorrespondenceHead(32, compute=compute), torch.randn(20, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head(x.bfloat16())
    outside = head(x.bfloat16())
    assert inside.dtype == outside.dtype == dtype
    assert torch.equal(inside, outside)
    inside.float().square().sum().backward()
    for parameter in head.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    if compute == "bf16":
        return
    exact = CorrespondenceHead(32).double()
    exact.load_state_dict(head.state_dict())
    reference = (
        exact.second.weight
        @ nn.functional.gelu(exact.first.weight @ x.bfloat16().double().mT + exact.first.bias[:, None])
        + exact.second.bias[:, None]
    )
    assert relative(outside.double().mT, reference) < 1e-6


def test_gradients_are_those_of_plain_linear_layers():
    torch.manual_seed(0)
    head, plain = CorrespondenceHead(32, 20, 24), nn.Sequential(nn.Linear(32, 20), nn.GELU(), nn.Linear(20, 24))
    plain[0].load_state_dict(head.first.state_dict())
    plain[2].load_state_dict(head.second.state_dict())
    x, grad = torch.randn(2, 7, 32), torch.randn(2, 7, 24)
    ours_x, plain_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    head(ours_x).backward(grad)
    plain(plain_x).backward(grad)
    torch.testing.assert_close(ours_x.grad, plain_x.grad)
    for ours, theirs in zip(head.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("compute, cublas_precision", [("fp32", "ieee"), ("tf32", "tf32")])
def test_the_chosen_precision_holds_in_forward_and_backward_and_is_restored(monkeypatch, compute, cublas_precision):
    used, original = [], precision.matmul_precision
    monkeypatch.setattr(precision, "matmul_precision", lambda name: used.append(name) or original(name))
    before = torch.backends.cuda.matmul.fp32_precision
    head = CorrespondenceHead(16, compute=compute)
    head(torch.randn(4, 16)).sum().backward()
    assert used == [cublas_precision] * 4  # two layers, forward and backward
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_the_precision_is_the_processs_own_again_after_an_error():
    before = torch.backends.cuda.matmul.fp32_precision
    other = "tf32" if before != "tf32" else "ieee"
    with pytest.raises(ZeroDivisionError), precision.matmul_precision(other):
        assert torch.backends.cuda.matmul.fp32_precision == other
        1 / 0  # noqa: B018
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tf32_rounds_and_fp32_does_not_on_a_gpu():
    torch.manual_seed(0)
    x = torch.randn(256, 512, device="cuda")
    errors = {}
    for compute in ("fp32", "tf32"):
        head = CorrespondenceHead(512, compute=compute).cuda()
        with torch.no_grad():
            reference = nn.functional.linear(x.double(), head.first.weight.double(), head.first.bias.double())
        errors[compute] = relative(head.first(x).double(), reference)
    assert errors["fp32"] < 1e-6 < 1e-5 < errors["tf32"]


def test_each_layer_has_a_head_of_its_own():
    torch.manual_seed(0)
    projections = {layer: (torch.randn(16, 16), torch.randn(16)) for layer in (5, 2, 9)}
    several = CorrespondenceHeads.from_query_projections(projections)
    assert several.layers == [2, 5, 9]
    alone = CorrespondenceHead.from_query_projection(*projections[5])
    x = torch.randn(4, 16)
    assert torch.equal(several(5, x), alone(x))
    assert not torch.equal(several(5, x), several(9, x))
    with pytest.raises(ValueError, match=r"layer = 3 has no head.*\[2, 5, 9\]"):
        several(3, x)


def test_layer_ranges_count_as_the_paper_counts():
    assert parse_layers("all", 4) == [0, 1, 2, 3]
    assert parse_layers("25-32", 32) == list(range(24, 32))
    assert parse_layers("1-2, 4", 4) == [0, 1, 3]
    for wrong in ("0-3", "3-33", "5-4", "x", "1-"):
        with pytest.raises(ValueError, match="layers = "):
            parse_layers(wrong, 32)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: CorrespondenceHead(16, compute="fp64"), "compute = 'fp64'.*fp32, tf32, bf16"),
        (lambda: CorrespondenceHead(16, mid_size=0), "mid_size = 0"),
        (lambda: CorrespondenceHead.from_query_projection(torch.empty(0)), "ZeRO-3"),
        (lambda: CorrespondenceHead.from_query_projection(torch.randn(8, 8), torch.randn(7)), r"bias has shape \(7,\)"),
        (lambda: CorrespondenceHead.from_query_projection(torch.randn(8, 8), out_size=9), "out_size = 9"),
        (lambda: CorrespondenceHeads({}), "heads is empty"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""The promises of the loss on a GPU: run there with `pytest -m gpu`, skipped elsewhere."""

from dataclasses import replace

import pytest
import torch
from support.agreement import gradient_of, in_given_metric, judge, leaves
from support.problems import Problem, random_problem, relative_error

import gasp_fast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")
SEQUENCES = [[300, 70, 1, 220], [180, 250, 90]]
WIDTHS = [40, 128, 256, 1000]


def step(problem: Problem, dtype: torch.dtype, backend: str, loss_scale: float = 1.0, **options):
    """loss, dE (and dK), dtau, metrics on the GPU."""
    embeddings, beside = leaves(problem, problem.embeddings.to(DEVICE, dtype))
    beside = {name: leaf.detach().to(DEVICE).requires_grad_() for name, leaf in beside.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    temperature = torch.tensor(0.07, dtype=wide, device=DEVICE, requires_grad=True)
    out = gasp_fast.gasp_loss(
        in_given_metric(embeddings, beside), problem.matches.to(DEVICE), keys=beside.get("keys"),
        temperature=temperature, negatives=problem.negatives,
        other_targets=problem.other_targets, return_metrics=True, backend=backend, **options,
    )  # fmt: skip
    weights = torch.linspace(-1, 2, out.loss.numel(), dtype=out.loss.dtype, device=DEVICE).view(out.loss.shape)
    (loss_scale * out.loss * (weights if out.loss.dim() else 1)).sum().backward()
    gradient = gradient_of(embeddings, **beside).to(torch.float64) / loss_scale
    return out.loss.detach(), gradient, temperature.grad / loss_scale, out.metrics


@pytest.mark.parametrize("negatives", ["sequence", "frame"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
def test_agrees_with_float64(dtype, tolerance, width, reduction, negatives):
    """float16 with a loss scale, as it is trained: the gradient of a mean is below float16's smallest numbers."""
    problem = random_problem(0, SEQUENCES, width=width, matches=900, planted=2.0, negatives=negatives)
    rounded = replace(problem, embeddings=problem.embeddings.to(dtype).double())
    truth = judge(rounded, reduction=reduction)
    loss_scale = 4096.0 if dtype == torch.float16 and reduction == "mean" else 1.0
    loss, embedding_gradient, temperature_gradient, metrics = step(
        rounded, dtype, "triton", loss_scale, reduction=reduction
    )
    assert relative_error(loss.cpu(), truth.loss) <= tolerance
    assert relative_error(embedding_gradient.cpu(), truth.embedding_gradient) <= tolerance
    assert relative_error(temperature_gradient.cpu(), truth.temperature_gradient) <= 10 * tolerance
    assert (metrics.accuracy.cpu() - truth.accuracy).abs().max() < 0.01


@pytest.mark.parametrize("workspace", [1, 256])  # with one MiB, columns are cut
@pytest.mark.parametrize("other_targets", ["negatives", "ignored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_weights_and_ignored_targets_agree_with_float64(dtype, other_targets, workspace):
    problem = random_problem(
        0, SEQUENCES, width=128, matches=900, planted=2.0, keys=True, weighted=True, other_targets=other_targets
    )
    rounded = replace(problem, embeddings=problem.embeddings.to(dtype).double(), keys=problem.keys.to(dtype).double())
    truth, ours = judge(rounded), step(rounded, dtype, "triton", workspace=workspace)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(ours[0].cpu(), truth.loss) <= tolerance
    assert relative_error(ours[1].cpu(), truth.embedding_gradient) <= tolerance


@pytest.mark.parametrize("workspace", [1, 256])  # with one MiB, columns are cut
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_metric_agrees_with_float64(dtype, reduction, workspace):
    problem = random_problem(0, SEQUENCES, width=136, matches=900, planted=2.0, weighted=True, metric=True)
    rounded = replace(
        problem, embeddings=problem.embeddings.to(dtype).double(), metric=problem.metric.to(dtype).double()
    )
    truth = judge(rounded, reduction=reduction)
    ours = step(rounded, dtype, "triton", workspace=workspace, reduction=reduction)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(ours[0].cpu(), truth.loss) <= tolerance
    assert relative_error(ours[1].cpu(), truth.embedding_gradient) <= tolerance
    assert relative_error(ours[2].cpu(), truth.temperature_gradient) <= 10 * tolerance


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["float32", "tf32", "bfloat16"])
def test_error_is_at_most_twice_that_of_dense_arithmetic(monkeypatch, width, kind):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32" if kind == "tf32" else "ieee")
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    problem = random_problem(0, SEQUENCES, width=width, matches=900, planted=2.0)
    rounded = replace(problem, embeddings=problem.embeddings.to(dtype).double())
    for reduction, result in (("none", 0), ("mean", 1)):  # every term (a mean may be exact by chance), the gradient
        truth = judge(rounded, reduction=reduction)
        t = (truth.loss, truth.embedding_gradient)[result].to(DEVICE)
        dense, ours = (step(rounded, dtype, backend, reduction=reduction)[result] for backend in ("torch", "triton"))
        assert relative_error(ours, t) <= 2 * relative_error(dense, t) + torch.finfo(dtype).eps


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_runs_agree_to_the_last_bit(width, dtype):
    problem = random_problem(0, SEQUENCES, width=width, matches=900)
    first, second = step(problem, dtype, "triton"), step(problem, dtype, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_host_never_waits(width, reduction):
    problem = random_problem(0, SEQUENCES, width=width, matches=900)
    matches = problem.matches.to(DEVICE)
    embeddings = problem.embeddings.to(DEVICE, torch.bfloat16).requires_grad_()
    temperature = torch.tensor(0.07, device=DEVICE, requires_grad=True)
    upstream = torch.tensor(1.0, device=DEVICE)

    def run():
        out = gasp_fast.gasp_loss(
            embeddings, matches, temperature=temperature, reduction=reduction, return_metrics=True
        )
        (out.loss.sum() * upstream).backward()

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("workspace", [32, 128, 512])
@pytest.mark.parametrize("width", [256, 1024])
def test_extra_memory_is_bounded(width, workspace):
    """No tensor of A x N elements; workspace, statistics and gradients are all there is."""
    frames, tokens = 16, 16 * 2048
    problem = random_problem(0, [[2048] * frames], layers=2, width=8, matches=tokens)
    matches = problem.matches.to(DEVICE)
    embeddings = torch.randn(2, tokens, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    gasp_fast.gasp_loss(embeddings, matches, workspace=workspace).loss.backward()
    embeddings.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gasp_fast.gasp_loss(embeddings, matches, workspace=workspace).loss.backward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    anchors = matches.index.rows.row_token.shape[0]
    gradients = embeddings.numel() * 2 + tokens * width * 4
    statistics = 2 * anchors * frames * 4 * 12
    assert anchors * tokens * 2 > 2 * workspace << 20  # a dense matrix would show
    assert extra - gradients - statistics <= workspace << 20


def test_compiled_gradients_are_the_eager_ones_to_the_last_bit():
    problem = random_problem(0, SEQUENCES, width=256, matches=900)
    matches = problem.matches.to(DEVICE)

    def loss(embeddings):
        return gasp_fast.gasp_loss(embeddings, matches).loss

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        embeddings = problem.embeddings.to(DEVICE, torch.bfloat16).requires_grad_()
        function(embeddings).backward()
        results.append(embeddings.grad)
    assert torch.equal(*results)


def test_addresses_pass_two_to_the_thirty_one():
    """[L, N, D] of 2.2 * 10^9 elements: the last layer must come out like the same layer alone."""
    layers, frames, tokens, width = 5, 26, 4096 * 26, 4096
    generator = torch.Generator().manual_seed(0)
    anchor = torch.randint(4096, (64,), generator=generator)
    target = torch.randint(4096, tokens, (64,), generator=generator)
    matches = gasp_fast.Matches(frame_offsets=torch.arange(frames + 1) * 4096, anchor=anchor, target=target).to(DEVICE)
    embeddings = torch.randn(layers, tokens, width, device=DEVICE, dtype=torch.bfloat16)
    assert embeddings.numel() > 2**31
    together = embeddings.requires_grad_()
    gasp_fast.gasp_loss(together, matches, reduction="sum").loss.backward()
    alone = embeddings.detach()[-1].clone().requires_grad_()
    gasp_fast.gasp_loss(alone, matches, reduction="sum").loss.backward()
    assert relative_error(together.grad[-1] * layers, alone.grad) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_embedding_row_stays_finite(dtype):
    problem = random_problem(0, SEQUENCES, width=128, matches=50)
    embeddings = problem.embeddings.to(DEVICE, dtype)
    dead = torch.stack([problem.matches.anchor[0], problem.matches.target[0]]).to(DEVICE)
    embeddings[:, dead] = 0
    embeddings.requires_grad_()
    out = gasp_fast.gasp_loss(embeddings, problem.matches.to(DEVICE))
    out.loss.backward()
    alive = torch.ones(embeddings.shape[1], dtype=torch.bool, device=DEVICE)
    alive[dead] = False
    assert out.loss.isfinite()
    assert embeddings.grad[:, alive].isfinite().all()

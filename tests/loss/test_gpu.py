"""The promises of the loss on a GPU: run there with `pytest -m gpu`, skipped elsewhere."""

import pytest
import torch
from support.agreement import judge
from support.problems import Problem, random_problem, relative_error

import gasp_fast
from gasp_fast.kernels import engines, rows_cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")
SEQUENCES = [[300, 70, 1, 220], [180, 250, 90]]
WIDTHS = [40, 128, 256, 1000]


def step(problem: Problem, dtype: torch.dtype, backend: str, **options):
    """loss, dE, dtau, metrics on the GPU."""
    embeddings = problem.embeddings.to(DEVICE, dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    temperature = torch.tensor(0.07, dtype=wide, device=DEVICE, requires_grad=True)
    out = gasp_fast.gasp_loss(
        embeddings, problem.matches.to(DEVICE), temperature, return_metrics=True, backend=backend, **options
    )
    weights = torch.linspace(-1, 2, out.loss.numel(), dtype=out.loss.dtype, device=DEVICE).view(out.loss.shape)
    (out.loss * (weights if out.loss.dim() else 1)).sum().backward()
    return out.loss.detach(), embeddings.grad, temperature.grad, out.metrics


@pytest.mark.parametrize("negatives", ["sequence", "frame"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
def test_agrees_with_float64(dtype, tolerance, width, reduction, negatives):
    problem = random_problem(0, SEQUENCES, width=width, matches=900, planted=2.0)
    rounded = Problem(problem.embeddings.to(dtype).double(), problem.matches, 0.07, negatives)
    truth = judge(rounded, reduction=reduction)
    loss, embedding_gradient, temperature_gradient, metrics = step(
        rounded, dtype, "triton", reduction=reduction, negatives=negatives
    )
    assert relative_error(loss.cpu(), truth.loss) <= tolerance
    assert relative_error(embedding_gradient.cpu(), truth.embedding_gradient) <= tolerance
    assert relative_error(temperature_gradient.cpu(), truth.temperature_gradient) <= 10 * tolerance
    assert (metrics.accuracy.cpu() - truth.accuracy).abs().max() < 0.01


@pytest.mark.parametrize("width", WIDTHS)
def test_tf32_agrees_with_float64(width):
    problem = random_problem(0, SEQUENCES, width=width, matches=900, planted=2.0)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        ours = step(problem, torch.float32, "triton")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    truth = judge(problem)
    assert relative_error(ours[0].cpu(), truth.loss) <= 1e-3
    assert relative_error(ours[1].cpu(), truth.embedding_gradient) <= 1e-3


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_dense_arithmetic(width, dtype):
    problem = random_problem(0, SEQUENCES, width=width, matches=900, planted=2.0)
    rounded = Problem(problem.embeddings.to(dtype).double(), problem.matches, 0.07, "sequence")
    truth = judge(rounded)
    dense, ours = (step(rounded, dtype, backend)[:2] for backend in ("torch", "triton"))
    for d, o, t in zip(dense, ours, (truth.loss.to(DEVICE), truth.embedding_gradient.to(DEVICE)), strict=True):
        assert relative_error(o, t) <= 2 * relative_error(d, t) + torch.finfo(dtype).eps


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
        out = gasp_fast.gasp_loss(embeddings, matches, temperature, reduction=reduction, return_metrics=True)
        (out.loss.sum() * upstream).backward()

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("width", [256, 1024])
def test_extra_memory_is_bounded(width):
    """No tensor of A x N elements; workspace, statistics and gradients are all there is."""
    frames, tokens = 16, 16 * 2048
    problem = random_problem(0, [[2048] * frames], layers=2, width=width, matches=tokens)
    matches = problem.matches.to(DEVICE)
    embeddings = problem.embeddings.to(DEVICE, torch.bfloat16).requires_grad_()
    gasp_fast.gasp_loss(embeddings, matches).loss.backward()
    embeddings.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gasp_fast.gasp_loss(embeddings, matches).loss.backward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    anchors = matches.index.rows.row_token.shape[0]
    gradients = embeddings.numel() * 2 + tokens * width * 4
    statistics = 2 * anchors * frames * 4 * 12
    assert anchors * tokens * 2 > 8 * engines.GPU_WORKSPACE  # a dense matrix would show
    assert extra - gradients - statistics <= 128 << 20


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
    layers, tokens, width = 5, 4096 * 26, 4096
    problem = random_problem(0, [[4096] * 26], layers=1, width=8, matches=64)
    matches = problem.matches.to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    embeddings = torch.empty(layers, tokens, width, device=DEVICE, dtype=torch.bfloat16).normal_(generator=generator)
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


@pytest.mark.skipif(rows_cuda.library() is None, reason="csrc/fused_rows.cu was not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cuda_kernel_agrees_with_the_triton_operations(monkeypatch, dtype):
    problem = random_problem(0, SEQUENCES, width=1000, matches=900, planted=2.0)
    plain = step(problem, dtype, "triton")
    monkeypatch.setenv("GASP_FAST_CUDA_ROWS", "1")
    fused, again = step(problem, dtype, "triton"), step(problem, dtype, "triton")
    for a, b in zip(fused[:3], plain[:3], strict=True):
        assert relative_error(a, b) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert torch.equal(fused[1], again[1])

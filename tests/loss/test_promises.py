"""Promises of the fast CPU backend beyond correct numbers; `test_gpu.py` tests those of a GPU."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.agreement import cpp_workspace
from support.allocations import allocations
from support.problems import random_problem, relative_error
from torch.utils.checkpoint import checkpoint

import gasp_fast
from gasp_fast.kernels import engines, rows_cpp
from gasp_fast.kernels.products import CONVERTED_BYTES
from gasp_fast.loss.naive import naive_loss

SEQUENCES = [[30, 7, 1, 22], [18, 25, 9]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def step(problem, dtype=torch.float32, upstream=1.0, backend="cpp", **options):
    embeddings = problem.embeddings.to(dtype).clone().requires_grad_()
    out = gasp_fast.gasp_loss(
        embeddings, problem.matches, temperature=0.07, backend=backend, return_metrics=True, **options
    )
    (upstream * out.loss).sum().backward()
    return [out.loss.detach(), out.corr_per_layer, out.depth_per_layer, out.metrics.confidence, embeddings.grad]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_runs_agree_to_the_last_bit(dtype, reduction):
    problem = random_problem(0, SEQUENCES, width=70, matches=200)
    first, second = step(problem, dtype, reduction=reduction), step(problem, dtype, reduction=reduction)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def poisoned_memory():
    """Every `torch.empty` is filled with NaN (or the largest integer): code that reads it before writing is found."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("matches", [0, 1, 60])
def test_nothing_unwritten_is_read(poisoned_memory, dtype, matches):
    assert torch.empty(3).isnan().all()
    problem = random_problem(0, SEQUENCES, width=33, matches=matches)
    poisoned = step(problem, dtype)
    assert all(value.isfinite().all() for value in poisoned)
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(poisoned, step(problem, dtype), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [1, 5_000, 40_000])
def test_any_chunking_gives_the_same_result(dtype, workspace):
    problem = random_problem(0, SEQUENCES, width=24, matches=150)
    whole = step(problem, dtype)
    with cpp_workspace(workspace):
        chunked = step(problem, dtype)
    for a, b in zip(whole, chunked, strict=True):
        assert relative_error(b, a) < (1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_anchor_times_token_size(dtype):
    """The workspace grows with neither: only statistics and gradients do."""
    width, extra = 64, []
    for frames in (8, 16):  # twice the anchors and twice the tokens
        tokens = 1024 * frames
        problem = random_problem(0, [[1024] * frames], layers=2, width=width, matches=tokens)
        anchors = problem.matches.index.rows.row_token.shape[0]
        embeddings = problem.embeddings.to(dtype).clone().requires_grad_()
        gasp_fast.gasp_loss(embeddings, problem.matches).loss.backward()  # allocates what is allocated only once
        embeddings.grad = None
        largest, peak = allocations(lambda e=embeddings, m=problem.matches: gasp_fast.gasp_loss(e, m).loss.backward())
        assert largest < anchors * tokens  # bytes: not even one byte for each pair
        gradients = 2 * tokens * width * dtype.itemsize
        if dtype != torch.float32:
            gradients += tokens * width * 4  # one layer's accumulator
        statistics = anchors * frames * 4 * 8
        extra.append(peak - gradients - statistics)
    assert max(extra) <= (engines.CPU_WORKSPACE << 20) + (8 << 20)
    assert extra[1] <= extra[0] + (4 << 20)


def test_all_rows_in_one_block_need_no_accumulator_of_all_tokens():
    tokens, width, workspace = 1 << 14, 256, 8 << 20
    anchors = torch.arange(32)
    matches = gasp_fast.Matches(
        frame_offsets=torch.tensor([0, tokens // 2, tokens]), anchor=anchors, target=anchors + tokens // 2
    )
    embeddings = torch.randn(1, tokens, width).bfloat16().requires_grad_()

    def work():
        embeddings.grad = None
        gasp_fast.gasp_loss(embeddings, matches, workspace=workspace >> 20, backend="cpp").loss.backward()

    work()  # allocates what is allocated only once
    largest, peak = allocations(work)
    accumulator = 4 * tokens * width
    assert largest < accumulator
    assert peak - embeddings.nbytes < workspace + CONVERTED_BYTES + (1 << 20) < accumulator


def test_addresses_pass_two_to_the_thirty_one():
    """Rows 2^26 elements apart: the last one starts at element 4.2 * 10^9. Only touched pages cost memory."""
    problem = random_problem(0, [[24, 17], [22]], layers=1, width=16, matches=20)
    tokens, stride = problem.embeddings.shape[1], 1 << 26
    storage = torch.empty(tokens * stride + 16, dtype=torch.bfloat16)
    spread = storage.as_strided((tokens, 16), (stride, 1))
    spread.copy_(problem.embeddings[0])
    assert (tokens - 1) * stride > 2**31
    results = []
    for rows in (spread, spread.contiguous()):
        rows.requires_grad_()
        out = gasp_fast.gasp_loss(rows, problem.matches, backend="cpp")
        out.loss.backward()
        results.append((out.loss.detach(), rows.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_only_what_requires_grad_gets_a_gradient():
    problem = random_problem(0, SEQUENCES, layers=2)
    layers = [layer.float().clone() for layer in problem.embeddings]
    layers[1].requires_grad_()
    temperature = torch.tensor(0.07)
    gasp_fast.gasp_loss(layers, problem.matches, temperature=temperature, backend="cpp").loss.backward()
    assert layers[0].grad is None and temperature.grad is None and layers[1].grad.abs().sum() > 0
    only_tau = torch.tensor(0.07, requires_grad=True)
    gasp_fast.gasp_loss(
        problem.embeddings.float(), problem.matches, temperature=only_tau, backend="cpp"
    ).loss.backward()
    assert only_tau.grad.abs() > 0


def test_without_gradient_no_gradient_is_computed(monkeypatch):
    problem = random_problem(0, SEQUENCES)

    def refuse(*_):
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(rows_cpp, "similarity_gradient", refuse)
    with torch.no_grad():
        gasp_fast.gasp_loss(problem.embeddings.float().requires_grad_(), problem.matches, backend="cpp")
    gasp_fast.gasp_loss(problem.embeddings.float(), problem.matches, backend="cpp")
    with pytest.raises(AssertionError, match="was computed"):
        gasp_fast.gasp_loss(problem.embeddings.float().requires_grad_(), problem.matches, backend="cpp")


@pytest.mark.parametrize("upstream", [0.0, -3.7, 1e3])
def test_any_upstream_gradient_is_honoured(upstream):
    problem = random_problem(0, SEQUENCES)
    plain, scaled = step(problem)[-1], step(problem, upstream=upstream)[-1]
    assert torch.allclose(scaled, upstream * plain, rtol=1e-6)


def test_a_retained_graph_gives_the_same_gradient_again():
    problem = random_problem(0, SEQUENCES)
    embeddings = problem.embeddings.float().requires_grad_()
    loss = gasp_fast.gasp_loss(embeddings, problem.matches, backend="cpp").loss
    (first,) = torch.autograd.grad(2.5 * loss, embeddings, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(2.5 * loss, embeddings, retain_graph=True)
    (third,) = torch.autograd.grad(loss, embeddings)
    assert torch.equal(first, second)
    assert torch.allclose(third * 2.5, first, rtol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_no_bit(use_reentrant):
    problem = random_problem(0, SEQUENCES)
    plain = step(problem)
    embeddings = problem.embeddings.float().clone().requires_grad_()
    loss = checkpoint(
        lambda e: gasp_fast.gasp_loss(e, problem.matches, backend="cpp").loss, embeddings, use_reentrant=use_reentrant
    )
    loss.backward()
    assert torch.equal(loss.detach(), plain[0]) and torch.equal(embeddings.grad, plain[-1])


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_under_autocast_nothing_is_cast(monkeypatch, backend):
    problem = random_problem(0, SEQUENCES)
    plain = step(problem, backend=backend)
    inside = []

    def spy(stack, workspace):
        inside.append(torch.is_autocast_enabled("cpu"))
        return engines.cpp_engine(stack, workspace)

    monkeypatch.setitem(engines.ENGINES, "cpp", spy)
    embeddings = problem.embeddings.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = gasp_fast.gasp_loss(embeddings, problem.matches, backend=backend).loss
    loss.backward()
    assert torch.equal(loss.detach(), plain[0]) and torch.equal(embeddings.grad, plain[-1])
    assert not any(inside) and bool(inside) == (backend == "cpp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_contiguous_embeddings_give_the_same_gradient(dtype):
    problem = random_problem(0, SEQUENCES, layers=3)
    plain = step(problem, dtype)
    for spread in (
        lambda e: e.transpose(0, 1).contiguous().transpose(0, 1),  # layers inside tokens
        lambda e: e.mT.contiguous().mT,  # columns
        lambda e: torch.stack([e, e], dim=-1)[..., 0],  # every other number
    ):
        embeddings = spread(problem.embeddings.to(dtype)).requires_grad_()
        assert not embeddings.is_contiguous()
        out = gasp_fast.gasp_loss(embeddings, problem.matches, backend="cpp")
        (gradient,) = torch.autograd.grad(out.loss, embeddings)
        assert torch.equal(gradient, plain[-1])


def test_compiled_gradients_are_the_eager_ones_to_the_last_bit():
    def loss(embeddings, temperature, matches, reduction):
        out = gasp_fast.gasp_loss(embeddings, matches, temperature=temperature, reduction=reduction, backend="cpp")
        return out.loss.sum()

    compiled = torch.compile(loss, fullgraph=True)
    for seed, reduction in [(0, "mean"), (1, "mean"), (2, "mean"), (3, "none")]:
        problem = random_problem(seed, SEQUENCES, matches=10 + seed)
        results = []
        for function in (loss, compiled):
            embeddings = problem.embeddings.float().clone().requires_grad_()
            temperature = torch.tensor(0.07, requires_grad=True)
            value = function(embeddings, temperature, problem.matches, reduction)
            (1.7 * value).backward()
            results.append((embeddings.grad, temperature.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiled_frame_match_gives_the_eager_results():
    problem = random_problem(0, [[12, 9, 14]], layers=1)
    rows, values = torch.arange(12), torch.rand(35, 2)

    def moments(embeddings):
        ours = gasp_fast.frame_match(embeddings, rows, problem.matches.frame_offsets, values=values, backend="cpp")
        return ours.lse.sum() + ours.expected.sum()

    results = []
    for function in (moments, torch.compile(moments)):
        embeddings = problem.embeddings.float().clone().requires_grad_()
        function(embeddings).backward()
        results.append(embeddings.grad)
    assert torch.equal(*results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction):
    problem = random_problem(0, SEQUENCES)
    embeddings = problem.embeddings.float().requires_grad_()
    loss = gasp_fast.gasp_loss(embeddings, problem.matches, reduction=reduction, backend="cpp").loss.sum()
    with pytest.raises(RuntimeError, match="use backend='torch'"):
        torch.autograd.grad(loss, embeddings, create_graph=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_no_match_is_no_loss_and_no_gradient(dtype):
    problem = random_problem(0, SEQUENCES, matches=0)
    embeddings = problem.embeddings.to(dtype).clone().requires_grad_()
    out = gasp_fast.gasp_loss(embeddings, problem.matches, return_metrics=True)
    out.loss.backward()
    assert out.loss == 0 and out.corr == 0 and out.depth == 0
    assert embeddings.grad.abs().max() == 0
    assert out.metrics.pck.isfinite().all()


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("missing", ["target_depth", "patch_depth", "valid", "known"])
def test_no_depth_is_a_zero_that_stays_connected(backend, missing):
    problem = random_problem(0, SEQUENCES)
    m = problem.matches
    depth = {"target_depth": m.target_depth, "depth_valid": m.depth_valid, "patch_depth": m.patch_depth}
    if missing == "target_depth":
        depth["target_depth"] = depth["depth_valid"] = None
    elif missing == "patch_depth":
        depth["patch_depth"] = None
    elif missing == "valid":
        depth["depth_valid"] = torch.zeros(len(m), dtype=torch.bool)
    else:
        depth["patch_depth"] = torch.full_like(m.patch_depth, float("nan"))
    matches = gasp_fast.Matches(
        frame_offsets=m.frame_offsets, sequence_offsets=m.sequence_offsets, anchor=m.anchor, target=m.target, **depth
    )
    embeddings = problem.embeddings.float().requires_grad_()
    out = gasp_fast.gasp_loss(embeddings, matches, backend=backend)
    assert out.depth == 0 and out.depth.requires_grad
    out.depth.backward(retain_graph=True)
    assert embeddings.grad.abs().max() == 0
    out.loss.backward()
    assert embeddings.grad.isfinite().all() and embeddings.grad.abs().max() > 0


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_embedding_row_stays_finite(backend, dtype):
    problem = random_problem(0, SEQUENCES)
    embeddings = problem.embeddings.to(dtype).clone()
    anchor, target = int(problem.matches.anchor[0]), int(problem.matches.target[0])
    for dead in (anchor, target):
        embeddings[:, dead] = 0
    embeddings.requires_grad_()
    out = gasp_fast.gasp_loss(embeddings, problem.matches, backend=backend)
    out.loss.backward()
    alive = torch.ones(embeddings.shape[1], dtype=torch.bool)
    alive[[anchor, target]] = False
    assert out.loss.isfinite()
    # The true gradient of a zero row is of the order of 1e12, which float16 cannot hold; all others must be finite.
    assert embeddings.grad[:, alive if dtype == torch.float16 else slice(None)].isfinite().all()


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("negatives", ["sequence", "frame"])
@pytest.mark.parametrize("other_targets", ["negatives", "ignored"])
@pytest.mark.parametrize("where", ["anchor", "target", "candidate"])
def test_a_nan_in_any_token_that_takes_part_reaches_the_loss(backend, negatives, other_targets, where):
    """Token 4 is the anchor, token 33 in the second frame its target, 36 one more candidate in the target's frame."""
    matches = gasp_fast.Matches(
        frame_offsets=torch.tensor([0, 30, 37, 60]), anchor=torch.tensor([4]), target=torch.tensor([33]),
        target_depth=torch.tensor([2.0]), patch_depth=torch.ones(60),
    )  # fmt: skip
    embeddings = torch.randn(2, 60, 16, generator=torch.Generator().manual_seed(0))
    embeddings[1, {"anchor": 4, "target": 33, "candidate": 36}[where], 3] = float("nan")
    for temperature in (0.07, 0.005):
        out = gasp_fast.gasp_loss(
            embeddings, matches, temperature=temperature, negatives=negatives, other_targets=other_targets,
            backend=backend,
        )  # fmt: skip
        assert out.corr_per_layer.isnan().tolist() == [False, True]
        assert out.depth_per_layer.isnan().tolist() == [False, True]
        assert out.loss.isnan()


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_matches_made_in_inference_mode_can_be_trained_with(backend, reduction):
    problem = random_problem(0, SEQUENCES)
    m = problem.matches
    with torch.inference_mode():
        made = gasp_fast.Matches(
            frame_offsets=m.frame_offsets.clone(), sequence_offsets=m.sequence_offsets, anchor=m.anchor.clone(),
            target=m.target, target_depth=m.target_depth.clone(), patch_depth=m.patch_depth.clone(),
            depth_valid=m.depth_valid,
        )  # fmt: skip
        problems = [replace(problem, matches=matches) for matches in (made, gasp_fast.Matches.pack([made]))]
    plain = step(problem, backend=backend, reduction=reduction)
    for other in problems:
        trained = step(other, backend=backend, reduction=reduction)
        assert all(torch.equal(a, b) for a, b in zip(plain, trained, strict=True))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@pytest.mark.parametrize("function", ["gasp_loss", "frame_match"])
def test_transforms_of_functions_are_refused_by_compiled_backends_and_right_with_torch(transform, function):
    problem = random_problem(0, [[6, 4]], layers=1, matches=5)
    embeddings, m = problem.embeddings.float(), problem.matches

    def value(e, backend="cpp"):
        if function == "gasp_loss":
            return gasp_fast.gasp_loss(e, m, backend=backend).loss
        return gasp_fast.frame_match(e, m.anchor, m.frame_offsets, backend=backend).lse.sum()

    def transformed(backend):
        if transform == "grad":
            return torch.func.grad(value)(embeddings, backend)
        if transform == "vmap":
            return torch.func.vmap(lambda e: value(e, backend))(embeddings[None])[0]
        return torch.func.jvp(lambda e: value(e, backend), (embeddings,), (embeddings,))[0]

    with pytest.raises(RuntimeError, match=r"'cpp' does not work under torch\.func .* use backend='torch'"):
        transformed("cpp")
    if transform == "grad":
        leaf = embeddings.clone().requires_grad_()
        (expected,) = torch.autograd.grad(value(leaf), leaf)
    else:
        expected = value(embeddings)
    assert torch.allclose(transformed("torch"), expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("depth", [1e18, 1e19, 3e38])
@pytest.mark.parametrize("where", ["target", "patch", "both"])
def test_an_absurd_depth_gives_the_loss_that_the_reference_gives(backend, depth, where):
    """Up to 1e18 a depth is a number; above, it is unknown, as infinity is: 3e38 marks holes in many depth maps."""
    problem = random_problem(0, SEQUENCES)
    m = problem.matches
    target, patch = m.target_depth.clone(), m.patch_depth.clone()
    if where != "patch":
        target[::2] = depth
    if where != "target":
        patch[::2] = depth
    matches = gasp_fast.Matches(
        frame_offsets=m.frame_offsets, sequence_offsets=m.sequence_offsets, anchor=m.anchor, target=m.target,
        target_depth=target, depth_valid=m.depth_valid, patch_depth=patch,
    )  # fmt: skip
    loss, *_, gradient = step(replace(problem, matches=matches), backend=backend)
    leaf = problem.embeddings.double().clone().requires_grad_()
    truth = naive_loss(leaf, matches, temperature=0.07).loss
    truth.backward()
    assert relative_error(loss, truth.detach()) < 1e-5 and relative_error(gradient, leaf.grad) < 1e-5


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_a_fork_after_the_loss_can_compute_it_too(backend):
    script = f"""
import os, torch, gasp_fast
torch.set_num_threads(2)
offsets, anchor = torch.tensor([0, 200, 400]), torch.arange(200)
m = gasp_fast.Matches(frame_offsets=offsets, anchor=anchor, target=anchor + 200)
e = torch.randn(2, 400, 64, requires_grad=True)
def loss():
    value = gasp_fast.gasp_loss(e, m, backend={backend!r}).loss
    value.backward()
    return value.item()
first = loss()
child = os.fork()
if child == 0:
    os._exit(0 if abs(loss() - first) < 1e-5 else 3)
assert os.waitpid(child, 0)[1] == 0
assert torch.get_num_threads() == 2
"""
    # A session of its own: where the child hangs, the time limit ends both.
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, start_new_session=True)
    try:
        _, error = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail("the child of the fork hangs")
    assert process.returncode == 0, error


def test_inference_mode_and_grad_free_callers():
    problem = random_problem(0, SEQUENCES)
    with torch.inference_mode():
        loss = gasp_fast.gasp_loss(problem.embeddings.float(), problem.matches, backend="cpp").loss
    assert torch.equal(loss, step(problem)[0])

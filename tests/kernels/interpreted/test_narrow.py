"""The narrow strategy against dense float64 autograd, on drawn problems with every irregularity that is legal."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gasp_fast.kernels import narrow, narrow_triton
from gasp_fast.kernels.chunk import FrameUpstream, MatchScales, MatchTerms
from gasp_fast.kernels.plan import MatchPlan

drawn = settings(max_examples=10, deadline=None, derandomize=True)
EPS = 1e-6
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Problem:
    embeddings: Tensor  # [L, N, D]
    plan: MatchPlan
    frame_offsets: list[int]
    sequence_offsets: list[int]
    anchor: Tensor
    target: Tensor
    depth: Tensor
    values: Tensor  # [N, V]
    known: Tensor
    scales: MatchScales
    temperature: Tensor

    def sequence_of(self, token: int) -> range:
        """Frames of the sequence that a token belongs to."""
        for first, last in zip(self.sequence_offsets[:-1], self.sequence_offsets[1:], strict=True):
            if self.frame_offsets[first] <= token < self.frame_offsets[last]:
                return range(first, last)
        raise AssertionError("a token lies in no sequence")


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    sequences = draw(
        st.lists(st.lists(st.sampled_from([1, 3, 20, 40]), min_size=2, max_size=3), min_size=1, max_size=2)
    )
    frame_offsets = torch.tensor([0, *(size for frames in sequences for size in frames)]).cumsum(0)
    sequence_offsets = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    tokens, layers, width = int(frame_offsets[-1]), draw(st.integers(1, 2)), draw(st.sampled_from([5, 16, 40]))
    anchor, target = [], []
    for _ in range(draw(st.sampled_from([0, 1, 6, 24]))):
        which = int(torch.randint(len(sequences), (), generator=generator))
        frames = torch.randperm(len(sequences[which]), generator=generator)[:2] + sequence_offsets[which]
        for found, frame in zip((anchor, target), frames, strict=True):
            size = frame_offsets[frame + 1] - frame_offsets[frame]
            found.append(int(frame_offsets[frame] + torch.randint(size, (), generator=generator)))
    matches = len(anchor)
    embeddings = torch.randn(layers, tokens, width, generator=generator)
    if draw(st.booleans()):
        embeddings[:, tokens // 2] = 0  # a zero row
    if draw(st.booleans()):
        embeddings = embeddings.mT.contiguous().mT
    known = torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    depth = torch.rand(matches, generator=generator) + 0.5
    values = torch.rand(tokens, 1, generator=generator) + 0.5
    return Problem(
        embeddings=embeddings,
        plan=MatchPlan.build(
            frame_offsets,
            sequence_offsets,
            torch.tensor(anchor, dtype=torch.int64),
            torch.tensor(target, dtype=torch.int64),
            depth,
            torch.rand(matches, generator=generator) < 0.8,
            values[:, 0],
            known,
        ),
        frame_offsets=frame_offsets.tolist(),
        sequence_offsets=sequence_offsets.tolist(),
        anchor=torch.tensor(anchor, dtype=torch.int64),
        target=torch.tensor(target, dtype=torch.int64),
        depth=depth.double(),
        values=values,
        known=known,
        scales=MatchScales(
            torch.rand(layers, 1, generator=generator).expand(layers, matches),
            torch.rand(layers, matches, generator=generator),
        ),
        temperature=torch.tensor(draw(st.sampled_from([0.07, 0.5]))),
    )


def similarities(embeddings: Tensor, temperature: Tensor) -> Tensor:
    unit = embeddings / embeddings.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return unit @ unit.mT / temperature  # [L, N, N]


def dense_terms(problem: Problem, embeddings: Tensor, temperature: Tensor, sequence: bool) -> tuple[Tensor, Tensor]:
    """Both terms [L, M], spelled out match by match."""
    s = similarities(embeddings, temperature)
    counts = torch.zeros(len(problem.anchor), dtype=torch.bool)
    counts[problem.plan.order] = problem.plan.counts
    corr, depth = [], []
    for m, (i, t) in enumerate(zip(problem.anchor.tolist(), problem.target.tolist(), strict=True)):
        frames = problem.sequence_of(i)
        frame = next(f for f in frames if problem.frame_offsets[f] <= t < problem.frame_offsets[f + 1])
        begin, end = problem.frame_offsets[frame], problem.frame_offsets[frame + 1]
        first, last = problem.frame_offsets[frames[0]], problem.frame_offsets[frames[-1] + 1]
        others = [k for k in range(first, last) if k != i] if sequence else list(range(begin, end))
        corr.append(s[:, i, others].logsumexp(-1) - s[:, i, t])
        among = [k for k in range(begin, end) if problem.known[k]]
        if counts[m] and among:
            found = s[:, i, among].softmax(-1) @ problem.values[among, 0].double()
            depth.append((problem.depth[m] - found).abs() / (problem.depth[m] + found + EPS))
        else:
            depth.append(s.new_zeros(s.shape[0]))
    empty = s.sum((1, 2))[:, None] * 0 @ s.new_zeros(1, 0)
    return (torch.stack(corr, 1), torch.stack(depth, 1)) if corr else (empty, empty)


def error(ours: Tensor, truth: Tensor, at_least: float = 0.0) -> float:
    """Relative to the norm of the truth, or to `at_least` where the truth may cancel to nothing."""
    return float((ours.double() - truth).norm() / truth.norm().clamp(min=max(at_least, 1e-30)))


def gradients(problem: Problem, dtype: torch.dtype, sequence: bool) -> tuple[MatchTerms, Tensor, Tensor]:
    embeddings = problem.embeddings.to(dtype)
    terms = MatchTerms.empty(*problem.scales.depth.shape, torch.device("cpu"))
    for value in terms[:2]:
        value.fill_(float("nan"))
    gradient = torch.full_like(embeddings, float("nan"))
    slope = narrow.match_terms(
        embeddings, problem.plan, problem.temperature, problem.scales, terms, sequence, EPS, gradient, True
    )
    assert slope is not None
    return terms, gradient, slope


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel leaves unwritten is seen."""
    fresh = torch.empty

    def poisoned(*args, **kwargs):
        memory = fresh(*args, **kwargs)
        return memory.fill_(float("nan") if memory.is_floating_point() else -(2**40))

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def fewer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes some milliseconds a program, whatever its size."""
    monkeypatch.setattr(narrow_triton, "TOKENS_AT_ONCE", 64)


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_terms_and_gradients_agree_with_dense_float64(dtype: torch.dtype, sequence: bool) -> None:
    @given(problem=problems())
    @settings(drawn, max_examples=12 if dtype == torch.float32 else 5)
    def holds(problem: Problem) -> None:
        embeddings = problem.embeddings.to(dtype).double().requires_grad_()
        temperature = problem.temperature.double().requires_grad_()
        corr, depth = dense_terms(problem, embeddings, temperature, sequence)
        ((problem.scales.corr * corr).sum() + (problem.scales.depth * depth).sum()).backward()
        terms, gradient, slope = gradients(problem, dtype, sequence)
        assert error(terms.corr, corr.detach(), at_least=1.0) < TOLERANCE[dtype]
        assert error(terms.depth, depth.detach(), at_least=1.0) < TOLERANCE[dtype]
        nonzero = embeddings.detach().norm(dim=-1) > 0  # a zero row has a direction in no one's arithmetic
        assert gradient.isfinite().all()
        pull = float(problem.scales.corr.norm() / problem.temperature)  # what single terms are made of
        assert error(gradient[nonzero], embeddings.grad[nonzero], at_least=0.1 * pull) < TOLERANCE[dtype]
        assert error(slope, temperature.grad, at_least=pull / float(problem.temperature)) < TOLERANCE[dtype]

    holds()


@given(problem=problems(), exclude_own=st.booleans(), width=st.sampled_from([0, 1, 3]))
@drawn
def test_frame_match_agrees_with_dense_float64(problem: Problem, exclude_own: bool, width: int) -> None:
    values = problem.values.repeat(1, 3)[:, :width].cumsum(1) if width else None
    known = problem.known if width else None
    rows = problem.plan.rows
    found = narrow.frame_match(problem.embeddings, rows, problem.temperature, values, known, exclude_own)

    embeddings = problem.embeddings.double().requires_grad_()
    temperature = problem.temperature.double().requires_grad_()
    s = similarities(embeddings, temperature)
    generator = torch.Generator().manual_seed(0)
    upstream = FrameUpstream(
        torch.randn(found.lse.shape, generator=generator).masked_fill(found.lse.isinf(), 0.0),
        torch.randn(found.expected.shape, generator=generator).masked_fill(found.known_lse.isinf()[..., None], 0.0),
    )
    total = s.sum() * 0
    for row, i in enumerate(rows.row_token.tolist()):
        for p, frame in enumerate(problem.sequence_of(i)):
            tokens = range(problem.frame_offsets[frame], problem.frame_offsets[frame + 1])
            candidates = [k for k in tokens if not (exclude_own and k == i)]
            if not candidates:
                assert (found.lse[:, row, p] == float("-inf")).all() and (found.best[:, row, p] == -1).all()
                continue
            lse = s[:, i, candidates].logsumexp(-1)
            torch.testing.assert_close(found.lse[:, row, p].double(), lse.detach(), rtol=1e-5, atol=1e-5)
            peak = s[:, i, candidates].amax(-1)
            torch.testing.assert_close(found.peak[:, row, p].double(), peak.detach(), rtol=1e-5, atol=1e-5)
            reached = s[:, i].gather(1, found.best[:, row, p, None])[:, 0]
            torch.testing.assert_close(reached.detach(), peak.detach(), rtol=1e-5, atol=1e-5)
            total = total + (upstream.lse[:, row, p].double() * lse).sum()
            among = [k for k in candidates if width and problem.known[k]]
            if among:
                expected = s[:, i, among].softmax(-1) @ values[among].double()
                torch.testing.assert_close(found.expected[:, row, p].double(), expected.detach(), rtol=1e-5, atol=1e-5)
                total = total + (upstream.expected[:, row, p].double() * expected).sum()
        assert (found.best[:, row, len(problem.sequence_of(i)) :] == -1).all()
    total.backward()
    gradient = torch.full_like(problem.embeddings, float("nan"))
    slope = narrow.frame_match_gradient(
        problem.embeddings, rows, problem.temperature, values, known, exclude_own, found, upstream, gradient, True
    )
    nonzero = embeddings.detach().norm(dim=-1) > 0
    assert error(gradient[nonzero], embeddings.grad[nonzero]) < 2e-5
    assert error(slope, temperature.grad) < 2e-5 or abs(float(slope) - float(temperature.grad)) < 1e-4


@given(problem=problems())
@settings(drawn, max_examples=3)
def test_two_runs_agree_to_the_last_bit(problem: Problem) -> None:
    first, second = (gradients(problem, torch.float32, True) for _ in range(2))
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


def test_the_first_of_equals_is_best() -> None:
    plan = MatchPlan.build(
        torch.tensor([0, 1, 201]), torch.tensor([0, 2]), torch.tensor([0]), torch.tensor([1]), None,
        torch.tensor([False]), None, torch.zeros(201, dtype=torch.bool),
    )  # fmt: skip
    embeddings = torch.ones(1, 201, 16)
    embeddings[:, 1:71] *= -1
    found = narrow.frame_match(embeddings, plan.rows, torch.tensor(0.07), None, None, False)
    assert found.best.tolist() == [[[0, 71]]]


@pytest.mark.parametrize("upstream", [1e-12, 1.0, 1e4])
def test_half_precision_keeps_its_accuracy_at_any_scale(upstream: float) -> None:
    """Gradients far below and above the range of fp16 are computed alike; only the result is rounded to fp16."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.tensor([0, 20, 40])
    anchor, target = torch.arange(20), torch.arange(20, 40)
    plan = MatchPlan.build(
        frames, torch.tensor([0, 2]), anchor, target, torch.rand(20, generator=generator) + 0.5,
        torch.ones(20, dtype=torch.bool), torch.rand(40, generator=generator) + 0.5, torch.ones(40, dtype=torch.bool),
    )  # fmt: skip
    embeddings = (torch.randn(1, 40, 16, generator=generator) / upstream**0.1).half()
    slopes = []
    for e in (embeddings, embeddings.float()):
        scales = MatchScales(*(torch.full((1, 20), upstream) for _ in range(2)))
        terms = MatchTerms.empty(1, 20, torch.device("cpu"))
        slopes.append(
            narrow.match_terms(e, plan, torch.tensor(0.07), scales, terms, True, EPS, torch.empty_like(e), True)
        )
    assert error(slopes[0], slopes[1].double()) < 5e-3


def test_the_own_token_is_out_of_the_way_at_a_sharp_temperature() -> None:
    """Left in, its probability would be e^100 or more: radial, hence projected away, but not without a trace."""
    generator = torch.Generator().manual_seed(0)
    everyone, no_depth = torch.arange(30), torch.zeros(60, dtype=torch.bool)
    plan = MatchPlan.build(
        torch.tensor([0, 30, 60]), torch.tensor([0, 2]), everyone, everyone + 30, None, no_depth[:30], None, no_depth
    )
    embeddings, tau = torch.randn(1, 60, 32, generator=generator), torch.tensor(0.004)
    upstream = FrameUpstream(torch.ones(1, 30, 2), torch.zeros(1, 30, 2, 0))
    found = narrow.frame_match(embeddings, plan.rows, tau, None, None, True)
    gradient = torch.empty_like(embeddings)
    narrow.frame_match_gradient(embeddings, plan.rows, tau, None, None, True, found, upstream, gradient, False)

    exact = embeddings.double().requires_grad_()
    s = similarities(exact, tau.double())[:, :30].masked_fill(torch.eye(30, 60, dtype=torch.bool), float("-inf"))
    (s[..., :30].logsumexp(-1).sum() + s[..., 30:].logsumexp(-1).sum()).backward()
    assert error(gradient, exact.grad) < 1e-5

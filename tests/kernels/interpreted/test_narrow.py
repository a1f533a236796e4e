"""The narrow strategy against dense float64 autograd, on drawn problems with every irregularity that is allowed."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gasp_fast import Matches
from gasp_fast.kernels import chunk, narrow, narrow_triton
from gasp_fast.kernels.chunk import FrameUpstream, MatchTerms, TermWeights
from gasp_fast.loss.naive import naive_loss

pytestmark = pytest.mark.usefixtures("poisoned_memory")
drawn = settings(max_examples=10, deadline=None, derandomize=True)
EPS = 1e-6
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Problem:
    embeddings: Tensor  # [L, N, D]
    matches: Matches
    weights: TermWeights  # [L, M]
    temperature: Tensor

    def frames_of_sequence(self, token: int) -> list[range]:
        """The tokens of each frame of the sequence that a token belongs to."""
        offsets, sequences = self.matches.frame_offsets.tolist(), self.matches.sequence_offsets.tolist()
        for first, last in pairwise(sequences):
            if offsets[first] <= token < offsets[last]:
                return [range(offsets[frame], offsets[frame + 1]) for frame in range(first, last)]
        raise AssertionError(f"token {token} is in no sequence")


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
        for tokens_of, frame in zip((anchor, target), frames, strict=True):
            size = frame_offsets[frame + 1] - frame_offsets[frame]
            tokens_of.append(int(frame_offsets[frame] + torch.randint(size, (), generator=generator)))
    matches = len(anchor)
    embeddings = torch.randn(layers, tokens, width, generator=generator)
    if draw(st.booleans()):
        embeddings[:, tokens // 2] = 0  # a zero row
    if draw(st.booleans()):
        embeddings = embeddings.mT.contiguous().mT
    known = torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    depth = torch.rand(matches, generator=generator) + 0.5
    values = torch.rand(tokens, generator=generator) + 0.5
    return Problem(
        embeddings=embeddings,
        matches=Matches(
            frame_offsets=frame_offsets,
            sequence_offsets=sequence_offsets,
            anchor=torch.tensor(anchor, dtype=torch.int64),
            target=torch.tensor(target, dtype=torch.int64),
            target_depth=depth,
            depth_valid=torch.rand(matches, generator=generator) < 0.8,
            patch_depth=torch.where(known, values, 0.0),
        ),
        weights=TermWeights(
            torch.rand(layers, 1, generator=generator).expand(layers, matches),
            torch.rand(layers, matches, generator=generator),
        ),
        temperature=torch.tensor(draw(st.sampled_from([0.07, 0.5]))),
    )


def similarities(embeddings: Tensor, temperature: Tensor) -> Tensor:
    unit = embeddings / embeddings.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return unit @ unit.mT / temperature  # [L, N, N]


def error(ours: Tensor, truth: Tensor, at_least: float = 0.0) -> float:
    """Relative to the norm of the truth, or to `at_least` where the truth may cancel to zero."""
    return float((ours.double() - truth).norm() / truth.norm().clamp(min=max(at_least, 1e-30)))


def gradients(problem: Problem, dtype: torch.dtype, negatives: str) -> tuple[MatchTerms, Tensor, Tensor]:
    embeddings = problem.embeddings.to(dtype)
    terms = MatchTerms.empty(*problem.weights.depth.shape, torch.device("cpu"))
    for value in terms[:2]:
        value.fill_(float("nan"))
    gradient, index = torch.full_like(embeddings, float("nan")), problem.matches.index
    slope = narrow.terms_and_gradients(
        chunk.Problem.of_loss(embeddings, index, problem.temperature), index, problem.weights, terms, negatives, EPS,
        gradient, True,
    )  # fmt: skip
    assert slope is not None
    return terms, gradient, slope


@pytest.fixture(autouse=True)
def fewer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter needs some milliseconds for each program, whatever its size."""
    monkeypatch.setattr(narrow_triton, "TOKENS_AT_ONCE", 64)


@pytest.mark.parametrize("negatives", ["sequence", "frame"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_terms_and_gradients_agree_with_dense_float64(dtype: torch.dtype, negatives: str) -> None:
    @given(problem=problems())
    @settings(drawn, max_examples=12 if dtype == torch.float32 else 5)
    def holds(problem: Problem) -> None:
        embeddings = problem.embeddings.to(dtype).double().requires_grad_()
        temperature = problem.temperature.double().requires_grad_()
        truth = naive_loss(embeddings, problem.matches, temperature, negatives, eps=EPS)
        ((problem.weights.corr * truth.corr).sum() + (problem.weights.depth * truth.depth).sum()).backward()
        terms, gradient, slope = gradients(problem, dtype, negatives)
        assert error(terms.corr, truth.corr.detach(), at_least=1.0) < TOLERANCE[dtype]
        assert error(terms.depth, truth.depth.detach(), at_least=1.0) < TOLERANCE[dtype]
        nonzero = embeddings.detach().norm(dim=-1) > 0  # a zero embedding has no direction
        assert gradient.isfinite().all()
        pull = float(problem.weights.corr.norm() / problem.temperature)  # size of a single term's gradient
        assert error(gradient[nonzero], embeddings.grad[nonzero], at_least=0.1 * pull) < TOLERANCE[dtype]
        assert error(slope, temperature.grad, at_least=pull / float(problem.temperature)) < TOLERANCE[dtype]

    holds()


@given(problem=problems(), exclude_own=st.booleans(), width=st.sampled_from([0, 1, 3]))
@drawn
def test_frame_match_agrees_with_dense_float64(problem: Problem, exclude_own: bool, width: int) -> None:
    matches = problem.matches
    values = (matches.patch_depth + 0.5)[:, None].repeat(1, width).cumsum(1) if width else None
    known = matches.known_depth() if width else None
    rows = matches.index.rows
    against_frames = chunk.Problem(problem.embeddings, rows, problem.temperature, values, known, exclude_own)
    found = narrow.frame_match(against_frames)

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
        frames = problem.frames_of_sequence(i)
        for p, tokens in enumerate(frames):
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
            known_candidates = [k for k in candidates if known is not None and known[k]]
            if known_candidates:
                expected = s[:, i, known_candidates].softmax(-1) @ values[known_candidates].double()
                torch.testing.assert_close(found.expected[:, row, p].double(), expected.detach(), rtol=1e-5, atol=1e-5)
                total = total + (upstream.expected[:, row, p].double() * expected).sum()
        assert (found.best[:, row, len(frames) :] == -1).all()
    total.backward()
    gradient = torch.full_like(problem.embeddings, float("nan"))
    slope = narrow.frame_match_gradient(against_frames, found, upstream, gradient, True)
    nonzero = embeddings.detach().norm(dim=-1) > 0
    assert error(gradient[nonzero], embeddings.grad[nonzero]) < 2e-5
    assert error(slope, temperature.grad) < 2e-5 or abs(float(slope) - float(temperature.grad)) < 1e-4


@given(problem=problems())
@settings(drawn, max_examples=3)
def test_two_runs_agree_to_the_last_bit(problem: Problem) -> None:
    first, second = (gradients(problem, torch.float32, "sequence") for _ in range(2))
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


def test_the_first_of_equals_is_best() -> None:
    matches = Matches(frame_offsets=torch.tensor([0, 1, 201]), anchor=torch.tensor([0]), target=torch.tensor([1]))
    embeddings = torch.ones(1, 201, 16)
    embeddings[:, 1:71] *= -1
    found = narrow.frame_match(chunk.Problem(embeddings, matches.index.rows, torch.tensor(0.07), None, None, False))
    assert found.best.tolist() == [[[0, 71]]]


@pytest.mark.parametrize("upstream", [1e-12, 1.0, 1e4])
def test_half_precision_keeps_its_accuracy_at_any_scale(upstream: float) -> None:
    """Gradients far below and above the range of fp16 are computed alike; only the result is rounded to fp16."""
    generator = torch.Generator().manual_seed(0)
    matches = Matches(
        frame_offsets=torch.tensor([0, 20, 40]),
        anchor=torch.arange(20),
        target=torch.arange(20, 40),
        target_depth=torch.rand(20, generator=generator) + 0.5,
        patch_depth=torch.rand(40, generator=generator) + 0.5,
    )
    embeddings = (torch.randn(1, 40, 16, generator=generator) / upstream**0.1).half()
    slopes = []
    for e in (embeddings, embeddings.float()):
        weights = TermWeights(*(torch.full((1, 20), upstream) for _ in range(2)))
        terms = MatchTerms.empty(1, 20, torch.device("cpu"))
        slopes.append(
            narrow.terms_and_gradients(
                chunk.Problem.of_loss(e, matches.index, torch.tensor(0.07)),
                matches.index,
                weights,
                terms,
                "sequence",
                EPS,
                torch.empty_like(e),
                True,
            )
        )
    assert error(slopes[0], slopes[1].double()) < 5e-3


def test_the_own_token_leaves_no_trace_at_a_low_temperature() -> None:
    """With it, its weight would be e^100 or more: radial, hence projected away, but not without rounding errors."""
    generator = torch.Generator().manual_seed(0)
    matches = Matches(frame_offsets=torch.tensor([0, 30, 60]), anchor=torch.arange(30), target=torch.arange(30, 60))
    rows = matches.index.rows
    embeddings, tau = torch.randn(1, 60, 32, generator=generator), torch.tensor(0.004)
    upstream = FrameUpstream(torch.ones(1, 30, 2), torch.zeros(1, 30, 2, 0))
    problem = chunk.Problem(embeddings, rows, tau, None, None, True)
    found = narrow.frame_match(problem)
    gradient = torch.empty_like(embeddings)
    narrow.frame_match_gradient(problem, found, upstream, gradient, False)

    exact = embeddings.double().requires_grad_()
    s = similarities(exact, tau.double())[:, :30].masked_fill(torch.eye(30, 60, dtype=torch.bool), float("-inf"))
    (s[..., :30].logsumexp(-1).sum() + s[..., 30:].logsumexp(-1).sum()).backward()
    assert error(gradient, exact.grad) < 1e-5

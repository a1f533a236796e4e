"""The fused row operations against `rows_torch`, on drawn problems with every irregularity that is allowed."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gasp_fast.kernels import rows_torch, rows_triton
from gasp_fast.kernels.chunk import FrameUpstream, MatchRuns, MatchTerms, RowChunk, TermWeights

pytestmark = pytest.mark.usefixtures("poisoned_memory")
drawn = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True)
class Problem:
    chunk: RowChunk
    runs: MatchRuns
    weights: TermWeights
    matches: int


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Rows of a later sequence: `first_token`, `longest` and the match arrays are those of a larger batch."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    frames = draw(st.lists(st.sampled_from([0, 1, 2, 5, 130, 150]), min_size=2, max_size=4))
    offsets = torch.tensor([0, *frames]).cumsum(0)
    tokens = max(int(offsets[-1]), 1)
    offsets[-1] = tokens
    groups, rows = draw(st.integers(1, 2)), draw(st.integers(1, 11))
    width = draw(st.sampled_from([0, 1, 1, 3]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    similarity = normal(groups, rows, tokens + 3)[..., :tokens]  # a view whose rows are longer
    if draw(st.booleans()):
        similarity[..., tokens // 2 :] = similarity[..., : tokens - tokens // 2].clone()  # equals: the first is best
    known = torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    chunk = RowChunk(
        similarity=similarity,
        row_scale=normal(groups, rows).abs() + 0.1,
        token_scale=torch.ones(groups, tokens) if draw(st.booleans()) else normal(groups, tokens).abs() + 0.1,
        temperature=torch.tensor(draw(st.sampled_from([0.07, 0.5]))),
        own_token=torch.randint(tokens, (rows,), generator=generator),
        exclude_own=draw(st.booleans()),
        frame_offsets=offsets,
        values=normal(tokens, width).abs() + 0.5 if width else None,
        known=known if width else None,
    )
    return _with_matches(chunk, generator, draw(st.integers(0, 3)))


def _with_matches(chunk: RowChunk, generator: torch.Generator, busiest: int) -> Problem:
    groups, rows, _ = chunk.similarity.shape
    sizes = (chunk.frame_offsets[1:] - chunk.frame_offsets[:-1]).tolist()
    longest, first_token, before = len(sizes) + 2, 17, 4  # sorted positions 0..3 belong to earlier rows
    start, target = [before], [0] * before
    for _ in range(rows):
        for frame in range(longest):
            size = sizes[frame] if frame < len(sizes) else 0
            count = int(torch.randint(busiest + 1, (), generator=generator)) if size else 0
            columns = torch.randint(size, (count,), generator=generator).sort().values if size else torch.zeros(0)
            target += [int(c) + int(chunk.frame_offsets[frame]) + first_token for c in columns]
            start.append(len(target))
    matches = len(target)
    depth = torch.rand(matches, generator=generator) + 0.5
    runs = MatchRuns(
        start=torch.tensor(start),
        longest=longest,
        order=torch.randperm(matches, generator=generator),
        target=torch.tensor(target),
        depth=depth,
        has_depth=torch.rand(matches, generator=generator) < (0.7 if chunk.values is not None else 0.0),
        first_token=first_token,
    )
    if chunk.known is not None:  # a match counts only where its frame has a known token
        for row in range(rows):
            for frame in range(len(sizes)):
                begin, end = chunk.frame_offsets[frame], chunk.frame_offsets[frame + 1]
                seen = chunk.known[begin:end].clone()
                own = int(chunk.own_token[row])
                if chunk.exclude_own and begin <= own < end:
                    seen[own - begin] = False
                for at in runs.run(row, frame):
                    runs.has_depth[at] &= bool(seen.any())
    weights = TermWeights(
        corr=torch.rand(groups, 1, generator=generator).expand(groups, matches),
        depth=torch.rand(groups, matches, generator=generator),
    )
    return Problem(chunk, runs, weights, matches)


def close(ours: Tensor, truth: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


@given(problem=problems(), by_run=st.booleans(), every_frame=st.booleans())
@drawn
def test_frame_statistics_are_those_of_pytorch(problem: Problem, by_run: bool, every_frame: bool) -> None:
    runs = problem.runs if by_run else None
    truth = rows_torch.frame_statistics(problem.chunk, runs, every_frame)
    ours = rows_triton.frame_statistics(problem.chunk, runs, every_frame)
    for name in truth._fields:
        close(getattr(ours, name), getattr(truth, name))


@given(
    problem=problems(),
    negatives=st.sampled_from(["sequence", "frame"]),
    with_weights=st.booleans(),
    from_positive=st.booleans(),
)
@drawn
def test_loss_terms_are_those_of_pytorch(
    problem: Problem, negatives: str, with_weights: bool, from_positive: bool
) -> None:
    chunk, runs = problem.chunk, problem.runs
    if chunk.values is None:
        return
    statistics = rows_torch.frame_statistics(chunk, runs, every_frame=negatives == "sequence")
    groups = chunk.similarity.shape[0]
    ours, truth = (MatchTerms.empty(groups, problem.matches, torch.device("cpu")) for _ in range(2))
    weights = problem.weights if with_weights else None
    rest = (statistics, runs, weights)
    expected = rows_torch.loss_terms(chunk, *rest, truth, negatives, 1e-6)
    if from_positive:
        positive = torch.zeros(groups, problem.matches)
        for row in range(chunk.similarity.shape[1]):
            for at in range(int(runs.start[row * runs.longest]), int(runs.start[(row + 1) * runs.longest])):
                column = int(runs.target[at]) - runs.first_token
                scale = chunk.row_scale[:, row] * chunk.token_scale[:, column] / chunk.temperature
                positive[:, at] = chunk.similarity[:, row, column] * scale
        upstream = rows_triton.loss_terms_from(positive, *rest, ours, negatives, 1e-6)
    else:
        upstream = rows_triton.loss_terms(chunk, *rest, ours, negatives, 1e-6)
    for name in ("corr", "depth", "best", "confidence"):
        torch.testing.assert_close(getattr(ours, name), getattr(truth, name), rtol=1e-5, atol=2e-5, equal_nan=True)
    assert (upstream is None) == (expected is None)
    if upstream is not None and expected is not None:
        close(upstream.lse, expected.lse)
        close(upstream.expected, expected.expected)


@given(problem=problems(), by_run=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@drawn
def test_the_similarity_gradient_is_that_of_pytorch(problem: Problem, by_run: bool, dtype: torch.dtype) -> None:
    chunk, runs, weights = problem.chunk, problem.runs if by_run else None, problem.weights if by_run else None
    statistics = rows_torch.frame_statistics(chunk, None, True)
    generator = torch.Generator().manual_seed(0)
    upstream = FrameUpstream(
        torch.randn(statistics.lse.shape, generator=generator).masked_fill(statistics.lse.isinf(), 0.0),
        torch.randn(statistics.expected.shape, generator=generator).masked_fill(
            statistics.known_lse.isinf()[..., None], 0
        ),
    )
    truth = torch.empty(chunk.similarity.shape)
    rows_torch.similarity_gradient(chunk, statistics, upstream, runs, weights, truth)
    in_place = replace(chunk, similarity=chunk.similarity.clone())
    ours = in_place.similarity if dtype == torch.float32 else torch.empty(truth.shape, dtype=dtype)
    rows_triton.similarity_gradient(in_place, statistics, upstream, runs, weights, ours)
    tolerance = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(ours.float(), truth, rtol=tolerance, atol=tolerance * float(truth.abs().max()))


def test_a_gradient_beyond_the_range_of_fp16_is_saturated() -> None:
    chunk = RowChunk(
        similarity=torch.zeros(1, 1, 2),
        row_scale=torch.full((1, 1), 1e12),
        token_scale=torch.full((1, 2), 1e12),
        temperature=torch.tensor(0.07),
        own_token=torch.tensor([0]),
        exclude_own=False,
        frame_offsets=torch.tensor([0, 1, 2]),
        values=None,
        known=None,
    )
    statistics = rows_triton.frame_statistics(chunk, None, True)
    upstream = FrameUpstream(torch.tensor([[[1.0, -1.0]]]), torch.zeros(1, 1, 2, 0))
    out = torch.empty(1, 1, 2, dtype=torch.float16)
    rows_triton.similarity_gradient(chunk, statistics, upstream, None, None, out)
    assert out.tolist() == [[[65504.0, -65504.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 9, 40), (5, 300)])
def test_norms_and_projected_gradients_are_those_of_pytorch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(shape, generator=generator).mT.contiguous().mT.to(dtype)  # columns lie together
    embeddings[..., 0, :] = 0
    embeddings[..., 1, :] *= 1e-7
    inverse = rows_triton.inverse_norms(embeddings)
    close(inverse, rows_torch.inverse_norms(embeddings), 1e-6)
    gradient = torch.randn(shape, generator=generator)
    ours, truth = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    rows_triton.project_gradient(gradient, embeddings, inverse, ours)
    rows_torch.project_gradient(gradient, embeddings, inverse, truth)
    close(ours.float(), truth.float(), {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype])
    rows_triton.project_gradient(gradient, embeddings, inverse, gradient)  # in place
    rows_torch.project_gradient(torch.randn(shape, generator=generator), embeddings, inverse, truth)
    assert gradient.isfinite().all()


def test_a_vanishing_embedding_keeps_its_whole_gradient() -> None:
    embeddings = torch.full((1, 1, 16), 1e-16)
    inverse = rows_triton.inverse_norms(embeddings)
    gradient = torch.randn(1, 1, 16)
    out = torch.empty_like(gradient)
    rows_triton.project_gradient(gradient, embeddings, inverse, out)
    assert inverse.item() == pytest.approx(1e12) and torch.equal(out, gradient)


def test_a_row_without_other_tokens_has_zero_upstream_gradients() -> None:
    chunk = RowChunk(
        similarity=torch.ones(1, 1, 1),
        row_scale=torch.ones(1, 1),
        token_scale=torch.ones(1, 1),
        temperature=torch.tensor(0.07),
        own_token=torch.tensor([0]),
        exclude_own=True,
        frame_offsets=torch.tensor([0, 1]),
        values=torch.ones(1, 1),
        known=torch.ones(1, dtype=torch.bool),
    )
    nothing = torch.zeros(0, dtype=torch.int64)
    runs = MatchRuns(torch.tensor([0, 0]), 1, nothing, nothing, torch.zeros(0), nothing.bool(), 0)
    statistics = rows_triton.frame_statistics(chunk, runs, True)
    weights, terms = TermWeights(torch.zeros(1, 0), torch.zeros(1, 0)), MatchTerms.empty(1, 0, torch.device("cpu"))
    upstream = rows_triton.loss_terms(chunk, statistics, runs, weights, terms, "sequence", 1e-6)
    assert upstream is not None
    assert upstream.lse.tolist() == [[[0.0]]] and upstream.expected.tolist() == [[[[0.0]]]]

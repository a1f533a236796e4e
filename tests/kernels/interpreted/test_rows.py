"""The fused row operations against `rows_torch`, on drawn problems with every irregularity that is allowed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gasp_fast.kernels import rows_torch, rows_triton
from gasp_fast.kernels.chunk import (
    AddedRows,
    ChunkMatches,
    FrameStatistics,
    FrameUpstream,
    MatchTerms,
    RowChunk,
    TermDefinition,
    TermWeights,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
drawn = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FIRST_TOKEN, FIRST_ROW, EARLIER = 17, 5, 4  # the chunk is part of a larger batch; matches 0 to 3 belong to earlier rows


@dataclass(frozen=True)
class Problem:
    """Rows against all tokens of a sequence, which `chunks` cuts in one or two."""

    similarity: Tensor  # float32 [G, R, n]
    chunk: RowChunk  # of all columns
    matches: ChunkMatches
    weights: TermWeights

    def chunks(self, cuts: list[int]) -> list[RowChunk]:
        """Fresh similarities of the columns between `cuts`, in memory whose rows are longer."""
        whole, found = self.chunk, []
        for begin, end in itertools.pairwise(cuts):
            groups, rows, _ = self.similarity.shape
            pitch = end - begin + 3
            memory = torch.full((groups, rows, pitch), 1e30)
            memory[..., : end - begin] = self.similarity[..., begin:end]
            span = slice(begin, end)
            found.append(
                replace(
                    whole,
                    similarity=memory[..., : end - begin],
                    token_scale=whole.token_scale[:, span],
                    first_token=whole.first_token + begin,
                    first_column=begin,
                    values=None if whole.values is None else whole.values[span],
                    known=None if whole.known is None else whole.known[span],
                )
            )
        return found

    def cut(self, where: float) -> list[int]:
        tokens = self.similarity.shape[-1]
        middle = round(where * tokens)
        return [0, middle, tokens] if 0 < middle < tokens else [0, tokens]


@st.composite
def problems(draw: st.DrawFn, temperatures: tuple[float, ...] = (0.07, 0.5, 0.01)) -> Problem:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    multiple = draw(st.sampled_from([1, 1, 2, 4]))
    frames = draw(st.lists(st.sampled_from([0, 1, 2, 5, 30, 150, 600]), min_size=2, max_size=4))
    sizes = [multiple * size for size in frames]
    sizes[-1] = max(multiple, sizes[-1])
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    tokens = int(offsets[-1])
    groups, rows = draw(st.integers(1, 2)), draw(st.integers(1, min(11, tokens)))
    width = draw(st.sampled_from([0, 1, 1, 3]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    candidates = normal(groups, tokens, 6) * normal(groups, tokens, 1).exp()
    if draw(st.booleans()):  # equals: the first is best
        candidates[:, tokens // 2 :] = candidates[:, : tokens - tokens // 2].clone()
    own = torch.randperm(tokens, generator=generator)[:rows]
    anchors = candidates[:, own]
    if draw(st.booleans()):  # other tokens than the candidates
        anchors = normal(groups, rows, 6)
    if draw(st.booleans()):  # opposite to all candidates: no similarity near the bound
        candidates, anchors = candidates.abs(), -anchors.abs()
    known = torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    values = torch.where(known[:, None], normal(tokens, width).abs() + 0.5, 0.0) if width else None
    chunk = RowChunk(
        similarity=anchors @ candidates.mT,
        row_scale=rows_torch.inverse_norms(anchors),
        token_scale=rows_torch.inverse_norms(candidates),
        temperature=torch.tensor(draw(st.sampled_from(temperatures))),
        row_token=FIRST_TOKEN + (own if draw(st.booleans()) else own + tokens),
        exclude_own=draw(st.booleans()),
        first_token=FIRST_TOKEN,
        frame_offsets=offsets,
        first_column=0,
        values=values,
        known=known.float() if width else None,
        multiple=multiple,
    )
    definition = TermDefinition(
        draw(st.sampled_from(["sequence", "frame"])), draw(st.sampled_from(["negatives", "ignored"])), 1e-6
    )
    return _with_matches(chunk, generator, draw(st.sampled_from([0, 1, 2, 3, 40])), definition)


def _with_matches(chunk: RowChunk, generator: torch.Generator, busiest: int, definition: TermDefinition) -> Problem:
    groups, rows, _ = chunk.similarity.shape
    offsets = chunk.frame_offsets.tolist()
    frames = len(offsets) - 1
    longest = frames + 2
    start, row_of, target, has_depth = [EARLIER], [0] * EARLIER, [0] * EARLIER, [False] * EARLIER
    for row in range(rows):
        own = int(chunk.row_token[row]) - FIRST_TOKEN
        for frame in range(longest):
            begin, end = (offsets[frame], offsets[frame + 1]) if frame < frames else (0, 0)
            allowed = end > begin and not begin <= own < end  # anchor and target are in different frames
            count = int(torch.randint(busiest + 1, (), generator=generator)) if allowed else 0
            few = min(end, begin + 4) if busiest == 3 else end  # some targets occur twice
            columns = torch.randint(begin, few, (count,), generator=generator).sort().values if count else []
            seen = allowed and chunk.known is not None and bool(chunk.known[begin:end].any())
            target += [int(column) + FIRST_TOKEN for column in columns]
            row_of += [row + FIRST_ROW] * count
            has_depth += [seen and bool(torch.rand((), generator=generator) < 0.7) for _ in range(count)]
            start.append(len(target))
    matches = len(target)
    later = 3  # matches of later rows
    run = ChunkMatches(
        start=torch.tensor(start),
        longest=longest,
        first_row=FIRST_ROW,
        order=torch.randperm(matches + later, generator=generator),
        row=torch.tensor(row_of + [FIRST_ROW + rows] * later),
        target=torch.tensor(target + [FIRST_TOKEN] * later),
        depth=torch.rand(matches + later, generator=generator) + 0.5,
        has_depth=torch.tensor(has_depth + [False] * later),
        positive=torch.full((groups, matches + later), 9.0),
        pull=torch.full((groups, matches + later), 9.0),
        definition=definition,
    )
    weights = TermWeights(
        corr=torch.rand(groups, 1, generator=generator).expand(groups, matches + later),
        depth=torch.rand(groups, matches + later, generator=generator),
    )
    return Problem(chunk.similarity.clone(), chunk, run, weights)


def with_memory(matches: ChunkMatches | None) -> ChunkMatches | None:
    """The same matches, whose results go elsewhere."""
    if matches is None:
        return None
    pull = None if matches.pull is None else matches.pull.clone()
    return replace(matches, positive=matches.positive.clone(), pull=pull)


def copied(statistics: FrameStatistics) -> FrameStatistics:
    parts = [part.clone() for part in statistics]
    same = statistics.negative_lse is statistics.lse
    return FrameStatistics(*parts[:5], negative_lse=parts[0] if same else parts[5])


def close(ours: Tensor, truth: Tensor, tolerance: float = 3e-5) -> None:
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance, equal_nan=True)


def statistics_of(operations, problem: Problem, cuts: list[int], matches: ChunkMatches | None) -> FrameStatistics:
    statistics = None
    for chunk in problem.chunks(cuts):
        statistics = operations.frame_statistics(chunk, matches, statistics)
    assert statistics is not None
    return statistics


@given(problem=problems(), with_matches=st.booleans(), where=st.sampled_from([0.0, 0.3, 0.7]))
@drawn
def test_frame_statistics_are_those_of_pytorch(problem: Problem, with_matches: bool, where: float) -> None:
    ours_of, truth_of = (with_memory(problem.matches) if with_matches else None for _ in range(2))
    cuts = problem.cut(where)
    truth = statistics_of(rows_torch, problem, cuts, truth_of)
    ours = statistics_of(rows_triton, problem, cuts, ours_of)
    assert (ours.negative_lse is ours.lse) == (truth.negative_lse is truth.lse)
    for name in ("lse", "known_lse", "expected", "peak", "negative_lse"):
        close(getattr(ours, name), getattr(truth, name))
    _assert_best(problem, ours, truth)
    if ours_of is not None and truth_of is not None:
        close(ours_of.positive, truth_of.positive)
        if len(cuts) > 2:  # the first chunk leaves matches of the second alone
            for operations, matches in ((rows_torch, truth_of), (rows_triton, ours_of)):
                matches.positive.fill_(9.0)
                statistics_of(operations, problem, cuts[:2], matches)
            close(ours_of.positive, truth_of.positive)


def _assert_best(problem: Problem, ours: FrameStatistics, truth: FrameStatistics) -> None:
    """The same token, or one that is as similar to float32's last bits; of exact equals the first."""
    differ = ours.best != truth.best
    if not differ.any():
        return
    for group, row, frame in differ.nonzero().tolist():
        mine, theirs = (int(s.best[group, row, frame]) - FIRST_TOKEN for s in (ours, truth))
        assert mine >= 0 and theirs >= 0
        x = problem.similarity[group, row] * problem.chunk.token_scale[group]
        assert abs(x[mine] - x[theirs]) <= 2e-6 * x[theirs].abs()
        assert x[mine] != x[theirs], "of equals the first"


@given(problem=problems(), with_weights=st.booleans())
@drawn
def test_loss_terms_are_those_of_pytorch(problem: Problem, with_weights: bool) -> None:
    ours_of, truth_of = with_memory(problem.matches), with_memory(problem.matches)
    cuts = problem.cut(0.0)
    if problem.chunk.values is None:
        problem.matches.has_depth[:] = False
        statistics = statistics_of(rows_torch, problem, cuts, truth_of)
        statistics = statistics._replace(expected=torch.zeros(*statistics.lse.shape, 1))
    else:
        statistics = statistics_of(rows_torch, problem, cuts, truth_of)
    ours_of.positive.copy_(truth_of.positive)
    groups, matches = truth_of.positive.shape
    ours, truth = (MatchTerms.empty(groups, matches, torch.device("cpu")) for _ in range(2))
    weights = problem.weights if with_weights else None
    expected = rows_torch.loss_terms(statistics, truth_of, weights, truth)
    upstream = rows_triton.loss_terms(statistics, ours_of, weights, ours)
    for name in ("corr", "depth", "best", "confidence"):
        close(getattr(ours, name), getattr(truth, name))
    close(ours_of.pull, truth_of.pull)
    assert (upstream is None) == (expected is None)
    if upstream is not None and expected is not None:
        close(upstream.lse, expected.lse)
        close(upstream.expected, expected.expected)


@given(
    problem=problems(),
    kind=st.sampled_from(["no matches", "no pull", "pull"]),
    where=st.sampled_from([0.0, 0.4]),
    visited=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@drawn
def test_the_similarity_gradient_is_that_of_pytorch(
    problem: Problem, kind: str, where: float, visited: bool, dtype: torch.dtype
) -> None:
    matches = None if kind == "no matches" else with_memory(problem.matches)
    if matches is not None and kind == "no pull":
        matches = replace(matches, pull=None)
    cuts, generator = problem.cut(where), torch.Generator().manual_seed(0)
    statistics = statistics_of(rows_torch, problem, cuts, matches)

    def upstream_of(lse: Tensor, *shape: int) -> Tensor:
        missing = lse.isinf().view(*lse.shape, *[1] * (len(shape) - lse.dim()))
        return torch.randn(shape, generator=generator).masked_fill(missing, 0.0)

    upstream = FrameUpstream(
        upstream_of(statistics.negative_lse, *statistics.lse.shape),
        upstream_of(statistics.known_lse, *statistics.expected.shape),
    )
    if matches is not None and matches.pull is not None:
        matches.pull.copy_(torch.randn(matches.pull.shape, generator=generator))
    for chunk, fresh in zip(problem.chunks(cuts), problem.chunks(cuts), strict=True):
        truth = torch.empty(chunk.similarity.shape)
        rows_torch.similarity_gradient(fresh, statistics, upstream, matches, truth)
        if visited:  # the statistics have overwritten what is left out
            rows_triton.frame_statistics(chunk, with_memory(matches), None)
        ours = chunk.similarity if dtype == torch.float32 else torch.empty(truth.shape, dtype=dtype)
        rows_triton.similarity_gradient(chunk, statistics, upstream, matches, ours)
        tolerance = {torch.float32: 3e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
        largest = float(truth.abs().max())
        if dtype == torch.float16:
            truth = truth.clamp(-65504, 65504)
        torch.testing.assert_close(ours.float(), truth, rtol=tolerance, atol=tolerance * largest + 1e-7)
        if dtype == torch.float32:  # nothing beside the rows was written
            beside = chunk.similarity.as_strided(chunk.similarity.shape[:2], chunk.similarity.stride()[:2],
                                                 chunk.similarity.shape[2])  # fmt: skip
            assert (beside == 1e30).all()


@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize("other_targets", ["negatives", "ignored"])
def test_nan_reaches_the_statistics_and_the_gradient(temperature: float, other_targets: str) -> None:
    chunk = small_chunk(torch.eye(3)[:2, None].mT.reshape(1, 2, 3), [0, 2, 3], temperature)
    chunk.similarity[0, 0, 1] = float("nan")
    statistics = rows_triton.frame_statistics(chunk, None, None)
    assert statistics.lse[0, 0, 0].isnan() and statistics.lse[0, 1].isfinite().all()
    upstream = FrameUpstream(torch.ones(1, 2, 2), torch.zeros(1, 2, 2, 0))
    out = torch.empty(1, 2, 3)
    rows_triton.similarity_gradient(chunk, statistics, upstream, None, out)
    assert out[0, 0, :2].isnan().all() and out[0, 1].isfinite().all()
    nothing = torch.zeros(0, dtype=torch.int64)
    matches = ChunkMatches(
        torch.zeros(5, dtype=torch.int64), 2, 0, nothing, nothing, nothing, torch.zeros(0), nothing.bool(),
        torch.zeros(1, 0), torch.zeros(1, 0), TermDefinition("sequence", other_targets, 1e-6),
    )  # fmt: skip
    merged = rows_triton.frame_statistics(chunk, matches, rows_triton.frame_statistics(chunk, matches, None))
    assert merged.lse[0, 0, 0].isnan() and merged.negative_lse[0, 0, 0].isnan()


def small_chunk(similarity: Tensor, offsets: list[int], temperature: float = 0.07) -> RowChunk:
    groups, rows, tokens = similarity.shape
    return RowChunk(
        similarity=similarity.clone(),
        row_scale=torch.ones(groups, rows),
        token_scale=torch.ones(groups, tokens),
        temperature=torch.tensor(temperature),
        row_token=torch.arange(rows),
        exclude_own=False,
        first_token=0,
        frame_offsets=torch.tensor(offsets),
        first_column=0,
        values=None,
        known=None,
    )


def test_a_gradient_beyond_the_range_of_fp16_is_saturated() -> None:
    chunk = replace(
        small_chunk(torch.zeros(1, 1, 2), [0, 1, 2]),
        row_scale=torch.full((1, 1), 1e12),
        token_scale=torch.full((1, 2), 1e12),
    )
    statistics = rows_triton.frame_statistics(chunk, None, None)
    upstream = FrameUpstream(torch.tensor([[[1.0, -1.0]]]), torch.zeros(1, 1, 2, 0))
    out = torch.empty(1, 1, 2, dtype=torch.float16)
    rows_triton.similarity_gradient(chunk, statistics, upstream, None, out)
    assert out.tolist() == [[[65504.0, -65504.0]]]


def test_a_row_without_other_tokens_has_zero_upstream_gradients() -> None:
    chunk = replace(
        small_chunk(torch.ones(1, 1, 1), [0, 1]),
        exclude_own=True,
        values=torch.ones(1, 1),
        known=torch.ones(1),
    )
    nothing = torch.zeros(0, dtype=torch.int64)
    matches = ChunkMatches(
        torch.tensor([0, 0]), 1, 0, nothing, nothing, nothing, torch.zeros(0), nothing.bool(),
        torch.zeros(1, 0), torch.zeros(1, 0), TermDefinition("sequence", "negatives", 1e-6),
    )  # fmt: skip
    statistics = rows_triton.frame_statistics(chunk, matches, None)
    assert statistics.lse.tolist() == [[[float("-inf")]]] and statistics.best.tolist() == [[[-1]]]
    weights, terms = TermWeights(torch.zeros(1, 0), torch.zeros(1, 0)), MatchTerms.empty(1, 0, torch.device("cpu"))
    upstream = rows_triton.loss_terms(statistics, matches, weights, terms)
    assert upstream is not None
    assert upstream.lse.tolist() == [[[0.0]]] and upstream.expected.tolist() == [[[[0.0]]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 9, 40), (5, 300), (3, 9000)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("of_unit", [False, True])
def test_norms_and_projected_gradients_are_those_of_pytorch(
    shape: tuple[int, ...], dtype: torch.dtype, transposed: bool, of_unit: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(shape, generator=generator).to(dtype)
    if transposed:  # columns lie together
        embeddings = embeddings.mT.contiguous().mT
    embeddings[..., 0, :] = 0
    if not of_unit:
        embeddings[..., 1, :] *= 1e-7
    inverse = rows_triton.inverse_norms(embeddings)
    close(inverse, rows_torch.inverse_norms(embeddings), 1e-6)
    inverse[..., 0] = inverse[..., 0].clamp(max=10.0) if of_unit else inverse[..., 0]
    gradient = torch.randn(shape, generator=generator)
    ours, truth = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    if len(shape) == 2:
        embeddings, inverse, gradient, ours, truth = (t[None] for t in (embeddings, inverse, gradient, ours, truth))
    rows_triton.project_gradient(gradient, embeddings, inverse, ours, of_unit)
    rows_torch.project_gradient(gradient, embeddings, inverse, truth, of_unit)
    close(ours.float(), truth.float(), {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype])
    in_place = gradient.clone()
    rows_triton.project_gradient(in_place, embeddings, inverse, in_place, of_unit)
    truth = torch.empty_like(gradient)
    rows_torch.project_gradient(gradient, embeddings, inverse, truth, of_unit)
    close(in_place, truth, 5e-6)


@pytest.mark.parametrize("width", [1, 24, 9000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [None, torch.tensor([0.25, 4.0])])
def test_gradients_of_rows_are_added_and_scaled_before_the_jacobian(
    width: int, dtype: torch.dtype, factor: torch.Tensor | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(2, 9, width, generator=generator).to(dtype)
    inverse = rows_torch.inverse_norms(embeddings)
    gradient, rows = torch.randn(2, 9, width, generator=generator), torch.randn(2, 4, width, generator=generator)
    added = AddedRows(rows, torch.tensor([-1, 7, 5, 0, 4, 8, -1, 6, -1]), first_row=5)
    ours, truth = torch.full((2, 9, width), float("nan")), torch.empty(2, 9, width)
    rows_triton.project_gradient(gradient, embeddings, inverse, ours, False, factor, added)
    rows_torch.project_gradient(gradient, embeddings, inverse, truth, False, factor, added)
    close(ours, truth, 5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_the_given_tokens_receive_a_gradient(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 9, 24, generator=generator).to(dtype)
    gradient, inverse = torch.randn(2, 4, 24, generator=generator), rows_torch.inverse_norms(embeddings)
    tokens = torch.tensor([7, 0, 3, 8])
    ours, truth = torch.full((2, 9, 24), 5.0), torch.full((2, 9, 24), 5.0)
    rows_triton.project_gradient(gradient, embeddings, inverse, ours, True, tokens=tokens)
    rows_torch.project_gradient(gradient, embeddings, inverse, truth, True, tokens=tokens)
    close(ours, truth, 5e-6)
    assert (ours == 5.0).all(-1).sum() == 2 * 5


@pytest.mark.parametrize("width", [1, 24, 9000])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_projected_gradients_with_duals_are_those_of_pytorch(
    width: int, transposed: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(2, 9, width, generator=generator)
    duals = embeddings + torch.randn(2, 9, width, generator=generator) / 2
    embeddings[:, 3], duals[:, 4], duals[:, 5] = 0, 0, -duals[:, 5]
    embeddings, duals = embeddings.to(dtype), duals.to(dtype)
    if transposed:
        embeddings = embeddings.mT.contiguous().mT
    inverse = rows_triton.inverse_norms(embeddings, duals)
    close(inverse, rows_torch.inverse_norms(embeddings, duals), 1e-6)
    gradient, rows = torch.randn(2, 9, width, generator=generator), torch.randn(2, 4, width, generator=generator)
    added = AddedRows(rows, torch.tensor([-1, 7, 5, 0, 4, 8, -1, 6, -1]), first_row=5)
    for more, tokens in ((None, None), (added, None), (None, torch.tensor([7, 0, 3, 8]))):
        given = gradient if tokens is None else rows
        ours, truth = torch.full((2, 9, width), 5.0), torch.full((2, 9, width), 5.0)
        rows_triton.project_gradient(given, embeddings, inverse, ours, False, None, more, tokens, duals)
        rows_torch.project_gradient(given, embeddings, inverse, truth, False, None, more, tokens, duals)
        close(ours, truth, 5e-6)


@pytest.mark.parametrize("operations", [rows_torch, rows_triton])
@pytest.mark.parametrize("kind", ["dense", "strided", "other type", "duals", "norms only"])
@pytest.mark.parametrize("width", [1, 40, 300])
def test_rows_are_copied_while_norms_are_taken(operations: Any, kind: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    tokens = torch.randn(2, 21, width, generator=generator).half()
    tokens = tokens.mT.contiguous().mT if kind == "strided" else tokens
    own = torch.randperm(21, generator=generator)[:9].sort().values
    row_of = torch.full((21,), -1).index_copy(0, own, torch.arange(9))
    duals = tokens + 0.125 if kind == "duals" else None
    norms, of_rows = torch.full((3, 21), float("nan")), torch.full((3, 9), float("nan"))
    anchors = torch.full((3, 9, width), float("nan"), dtype=torch.float32 if kind == "other type" else torch.float16)
    to = None if kind == "norms only" else anchors[:2]
    operations.norms_and_rows(tokens, duals, own, row_of, norms[:2], of_rows[:2], to)
    torch.testing.assert_close(norms[:2], rows_torch.inverse_norms(tokens, duals), rtol=1e-6, atol=0)
    assert torch.equal(of_rows[:2], norms[:2, own]) and norms[2].isnan().all() and of_rows[2].isnan().all()
    assert anchors.isnan().all() if to is None else torch.equal(to, tokens[:, own].to(to.dtype))


@pytest.mark.parametrize("norms", [rows_torch.inverse_norms, rows_triton.inverse_norms])
def test_a_norm_that_is_lost_in_rounding_has_a_bound(norms: Callable[..., torch.Tensor]) -> None:
    x, dual = torch.zeros(2, 1, 5, 8)
    x[0, :4, 0], dual[0, :, :2] = 2.0, torch.tensor([[3, 4], [0, 5], [-3, 4], [0.01, 5], [3, 4]])
    x[0, 4] = float("nan")
    inverse = norms(x, dual)[0]
    bound = (2 * 5 / 256) ** -0.5  # |x| |x'| / 2^8
    assert inverse[:4].tolist() == pytest.approx([6**-0.5, bound, bound, bound], rel=1e-6)
    assert inverse[4].isnan()
    nothing = torch.zeros(1, 1, 8)
    assert norms(nothing, dual[:, :1]).item() == norms(x[:, :1], nothing).item() == pytest.approx(1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 8), (70, 400), (130, 130)])
def test_what_is_between_two_rows_is_added(rows: int, tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    # Sums of these have few digits: the interpreter cuts those of bf16 off. In fp16 some leave its range.
    x = (512 * torch.randint(-100, 101, (2, rows, tokens), generator=generator)).to(dtype)
    order = torch.randperm(tokens, generator=generator)
    own, others = order[:rows].sort().values, order[rows:].sort().values
    row_of = torch.full((tokens,), -1).index_copy(0, own, torch.arange(rows))
    rest = torch.full((2, rows, tokens + 3), float("nan"), dtype=dtype)
    ours, truth, true_rest = x.clone(), x.clone(), torch.empty(2, rows, tokens - rows, dtype=dtype)
    rows_torch.fold(truth, own, row_of, others, true_rest)
    rows_triton.fold(ours, own, row_of, others, rest[..., : tokens - rows])
    assert truth.isfinite().all() and torch.equal(ours, truth) and torch.equal(rest[..., : tokens - rows], true_rest)
    assert rest[..., tokens - rows :].isnan().all()


def test_a_vanishing_embedding_keeps_its_whole_gradient() -> None:
    embeddings = torch.full((1, 1, 16), 1e-16)
    inverse = rows_triton.inverse_norms(embeddings)
    gradient = torch.randn(1, 1, 16)
    out = torch.empty_like(gradient)
    rows_triton.project_gradient(gradient, embeddings, inverse, out, of_unit=False)
    assert inverse.item() == pytest.approx(1e12) and torch.equal(out, gradient)


@pytest.mark.parametrize("width", [1, 24, 300, 9000])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "to"), [(torch.float32, torch.float32), (torch.float16, torch.float32)])
def test_rows_are_gathered_in_any_order(width: int, transposed: bool, dtype: torch.dtype, to: torch.dtype) -> None:
    source = torch.randn(2, 11, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    source = source.mT.contiguous().mT if transposed else source
    index = torch.tensor([10, 0, 3, 3, 7])
    out = torch.full((2, 5, width), float("nan"), dtype=to)
    rows_triton.gather_rows(source, index, out)
    assert torch.equal(out, source[:, index].to(to))


@pytest.mark.parametrize("width", [1, 24, 300, 9000])
def test_rows_are_added_to_their_columns(width: int) -> None:
    generator = torch.Generator().manual_seed(2)
    rows, columns = torch.randn(2, 7, width, generator=generator), torch.randperm(11, generator=generator)[:7]
    ours = torch.randn(2, 15, width, generator=generator)[:, 2:13]  # tokens of one sequence
    truth = ours.clone()
    rows_triton.add_rows(rows, columns, ours)
    rows_torch.add_rows(rows, columns, truth)
    assert torch.equal(ours, truth)

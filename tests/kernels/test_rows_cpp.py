"""The row operations of the CPU extension, called one by one, against their definition in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import random_problem
from torch import Tensor

import gasp_fast
from gasp_fast.kernels import rows_cpp, rows_torch
from gasp_fast.kernels.chunk import (
    AddedRows,
    ChunkMatches,
    FrameUpstream,
    MatchTerms,
    RowChunk,
    TermDefinition,
    TermWeights,
)

DEFINITIONS = [
    TermDefinition(negatives, other_targets, 1e-6)
    for negatives in ("sequence", "frame")
    for other_targets in ("negatives", "ignored")
]


@dataclass(frozen=True)
class Drawn:
    """Some rows of the last sequence of a batch, against all of its tokens, in one or more cuts of its columns."""

    seed: int
    frames: list[int]
    temperature: float
    cuts: list[int]  # columns, ascending from 0 to the last
    planted: float = 0.0
    holes: float = 0.3
    matches: int = 40
    width: int = 1  # of the values
    definition: TermDefinition | None = None  # None: `frame_match`, without matches
    exclude_own: bool = True
    out: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        problem = random_problem(
            self.seed, [[6, 5], self.frames], layers=1, width=12, matches=self.matches, planted=self.planted,
            holes=self.holes,
        )  # fmt: skip
        object.__setattr__(self, "index", problem.matches.index)
        object.__setattr__(self, "embeddings", problem.embeddings.float())

    def chunk(self, operations, similarity: Tensor, rows: slice, first: int, last: int) -> RowChunk:
        index, sequence = self.index, self.index.rows.sequences[-1]
        tokens = slice(sequence.tokens[0] + first, sequence.tokens[0] + last)
        norms = operations.inverse_norms(self.embeddings).to(similarity.dtype)
        generator = torch.Generator().manual_seed(self.seed)
        values = 0.5 + 3 * torch.rand(len(index.known), max(self.width, 1), generator=generator).to(similarity.dtype)
        values = index.values.to(values) if self.width == 1 else values * index.known[:, None]
        return RowChunk(
            similarity=similarity[:, :, first:last].contiguous(),
            row_scale=norms[:, index.rows.row_token[rows]],
            token_scale=norms[:, tokens],
            temperature=torch.tensor(self.temperature, dtype=torch.float32).to(similarity),
            row_token=index.rows.row_token[rows],
            exclude_own=self.exclude_own,
            first_token=tokens.start,
            frame_offsets=index.rows.frame_columns(sequence),
            first_column=first,
            values=values[tokens] if self.width else None,
            known=index.known[tokens] if self.width else None,
        )

    def results(self, operations, dtype: torch.dtype) -> dict[str, Tensor]:
        """What each operation writes, one after the other."""
        index, sequence = self.index, self.index.rows.sequences[-1]
        first, last = sequence.rows
        rows = slice(first + (last - first) // 3, last)  # not from the first row of the sequence
        count, total = rows.stop - rows.start, index.target.shape[0]
        embeddings = self.embeddings.to(dtype)
        similarity = embeddings[:, index.rows.row_token[rows]] @ embeddings[:, slice(*sequence.tokens)].mT
        panels = [self.chunk(operations, similarity, rows, *cut) for cut in itertools.pairwise(self.cuts)]
        generator = torch.Generator().manual_seed(self.seed)

        def drawn(*shape: int) -> Tensor:
            """Positive, negative and zero."""
            numbers = torch.randn(shape, generator=generator)
            return torch.where(numbers.abs() < 0.2, 0.0, numbers).to(dtype)

        matches = terms = None
        if self.definition is not None:
            positive, pull = torch.zeros(2, 1, total, dtype=dtype)
            matches = ChunkMatches.of(index, rows, positive, pull, self.definition)
            terms = MatchTerms(*(torch.zeros(1, total, dtype=dtype) for _ in range(4)))
            terms = terms._replace(best=terms.best.long())
        statistics = None
        for panel in panels:
            statistics = operations.frame_statistics(panel, matches, statistics)
        if matches is None:
            upstream = FrameUpstream(drawn(*statistics.lse.shape), drawn(*statistics.expected.shape))
        else:
            weights = TermWeights(drawn(1, total), drawn(1, 1).expand(1, total))
            upstream = operations.loss_terms(statistics, matches, weights, terms)
        x = []
        for panel, cut in zip(panels, itertools.pairwise(self.cuts), strict=True):
            if len(panels) > 1:  # similarities are computed again
                panel.similarity.copy_(similarity[:, :, slice(*cut)])
            in_place = dtype == torch.float64 or self.out == torch.float32
            x.append(panel.similarity if in_place else torch.empty_like(panel.similarity, dtype=self.out))
            operations.similarity_gradient(panel, statistics, upstream, matches, x[-1])
        scale = panels[0].row_scale[:, :, None] * similarity.new_ones(similarity.shape) / self.temperature
        results = {"x": torch.cat(x, 2).to(dtype) / scale, **statistics._asdict()}
        results |= {f"upstream.{name}": value for name, value in upstream._asdict().items()}
        if matches is not None:
            results |= {"positive": matches.positive, "pull": matches.pull}
            results |= {f"terms.{name}": value for name, value in terms._asdict().items()}
        assert count == similarity.shape[1]
        return results


@st.composite
def drawn_chunks(draw: st.DrawFn) -> Drawn:
    frames = draw(st.lists(st.sampled_from([0, 1, 2, 7, 16, 19, 40]), min_size=2, max_size=5))
    frames[0] += 1
    inside = draw(st.lists(st.integers(1, sum(frames)), max_size=2))
    definition = draw(st.sampled_from([None, *DEFINITIONS]))
    return Drawn(
        seed=draw(st.integers(0, 2**31)),
        frames=frames,
        temperature=draw(st.sampled_from([0.005, 0.02, 0.025, 0.07, 1.0])),
        cuts=sorted({0, *inside, sum(frames)}),
        planted=draw(st.sampled_from([0.0, 1.0, 5.0])),
        holes=draw(st.sampled_from([0.0, 0.3, 0.9])),
        matches=draw(st.sampled_from([3, 40, 150])),
        width=draw(st.sampled_from([0, 1, 3] if definition is None else [1, 3])),
        definition=definition,
        exclude_own=definition is not None or draw(st.booleans()),
        out=draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )


def assert_agree(drawn: Drawn) -> None:
    """Similarities are at most 1 / tau, rounded a few times; exponentials are as exact as these."""
    truth, ours = drawn.results(rows_torch, torch.float64), drawn.results(rows_cpp, torch.float32)
    tolerance = 1e-6 * max(1.0, 1.0 / drawn.temperature)
    for name, value in ours.items():
        rounding = 2**-8 if name == "x" and drawn.out == torch.bfloat16 else 0.0
        if "best" in name:
            continue
        torch.testing.assert_close(
            value.double(), truth[name], rtol=tolerance + rounding, atol=4 * tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
    # The most similar token may be another one if both are equally similar up to rounding.
    assert torch.equal(ours["best"] < 0, truth["best"] < 0)
    assert (ours["best"] == truth["best"]).double().mean() > 0.95 or ours["best"].numel() < 20


@settings(deadline=None, max_examples=200)
@given(drawn_chunks())
def test_each_operation_is_that_of_the_definition(drawn):
    assert_agree(drawn)


@pytest.mark.parametrize("definition", [None, *DEFINITIONS], ids=str)
@pytest.mark.parametrize("temperature", [0.005, 0.07])
def test_frames_of_hundreds_of_tokens(definition, temperature):
    frames = [576, 300, 1, 0, 129]
    for cuts in ([0, sum(frames)], [0, 400, 700, sum(frames)]):
        assert_agree(Drawn(1, frames, temperature, cuts, definition=definition, planted=2.0, matches=300))


@pytest.mark.parametrize("definition", DEFINITIONS, ids=str)
@pytest.mark.parametrize("temperature", [0.005, 0.07])
def test_of_equal_tokens_the_first_is_the_best(definition, temperature):
    drawn = Drawn(2, [20, 20], temperature, [0, 40], definition=definition, matches=100)
    drawn.embeddings[:] = drawn.embeddings[:, :1]
    ours, truth = drawn.results(rows_cpp, torch.float32)["best"], drawn.results(rows_torch, torch.float32)["best"]
    assert torch.equal(ours, truth)


@pytest.mark.parametrize("negatives", ["sequence", "frame"])
def test_negatives_far_below_an_ignored_target_keep_their_digits(negatives):
    definition = TermDefinition(negatives, "ignored", 1e-6)
    drawn = Drawn(3, [20, 20], 0.015, [0, 40], definition=definition, planted=2.0, matches=12)
    truth, ours = drawn.results(rows_torch, torch.float64), drawn.results(rows_cpp, torch.float32)
    small = (truth["terms.corr"] > 1e-9) & (truth["terms.corr"] < 1e-5)  # of 1e-14 even float64 has no digit
    assert small.any() and ((truth["pull"].abs() < 1e-12) & (truth["pull"] != 0)).any()
    torch.testing.assert_close(ours["terms.corr"][small].double(), truth["terms.corr"][small], rtol=2e-3, atol=0.0)
    torch.testing.assert_close(ours["pull"].double(), truth["pull"], rtol=2e-3, atol=1e-36)


def two_frames(anchor: list[int], target: list[int]) -> gasp_fast.Matches:
    offsets = torch.tensor([0, 25, 50])
    return gasp_fast.Matches(frame_offsets=offsets, anchor=torch.tensor(anchor), target=torch.tensor(target))


@pytest.mark.parametrize("definition", DEFINITIONS, ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.07])
@pytest.mark.parametrize("who", ["anchor", "target", "candidate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_nan_in_any_token_that_takes_part_reaches_the_loss(definition, temperature, who, dtype):
    embeddings = torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    matches = two_frames([3, 3, 9], [30, 41, 30])
    embeddings[:, {"anchor": 9, "target": 41, "candidate": 44}[who]] = float("nan")
    out = gasp_fast.gasp_loss(
        embeddings, matches, temperature=temperature, negatives=definition.negatives,
        other_targets=definition.other_targets, backend="cpp",
    )  # fmt: skip
    assert out.loss.isnan()


@pytest.mark.parametrize("definition", DEFINITIONS, ids=str)
def test_where_every_similarity_is_nan_so_is_the_loss(definition):
    embeddings = torch.full((1, 50, 8), float("nan"))
    matches = two_frames([3], [30])
    for temperature in (0.01, 0.07):
        assert gasp_fast.gasp_loss(
            embeddings, matches, temperature=temperature, negatives=definition.negatives,
            other_targets=definition.other_targets, backend="cpp",
        ).loss.isnan()  # fmt: skip


@pytest.mark.parametrize("of_unit", [False, True])
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 130])
def test_norms_and_their_jacobian_are_those_of_the_definition(width, dtype, to, of_unit):
    generator = torch.Generator().manual_seed(width)
    embeddings, gradient = torch.randn(2, 1, 9, width, generator=generator)
    embeddings[:, 4] = 0.0  # its norm is clamped
    embeddings[:, 5] = 1e-3
    embeddings = embeddings.to(dtype)
    norms, truth = rows_cpp.inverse_norms(embeddings), rows_torch.inverse_norms(embeddings)
    torch.testing.assert_close(norms, truth, rtol=1e-6, atol=0.0)
    ours, expected = torch.empty_like(gradient, dtype=to), torch.empty_like(gradient)
    rows_torch.project_gradient(gradient, embeddings, norms, expected, of_unit)
    rows_cpp.project_gradient(gradient, embeddings, norms, ours, of_unit)
    size = norms[..., None] if of_unit else torch.ones(())  # of the gradient
    tolerance = 1e-6 if to == torch.float32 else 2**-8
    torch.testing.assert_close(ours.float() / size, expected / size, rtol=tolerance, atol=2 * tolerance)


def test_a_gradient_is_projected_in_its_own_memory():
    embeddings, gradient = torch.randn(2, 1, 5, 40, generator=torch.Generator().manual_seed(0))
    embeddings = embeddings.bfloat16()
    norms, expected = rows_cpp.inverse_norms(embeddings), torch.empty_like(gradient)
    rows_torch.project_gradient(gradient, embeddings, norms, expected, of_unit=False)
    rows_cpp.project_gradient(gradient, embeddings, norms, gradient, of_unit=False)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 130])
def test_gradients_of_rows_are_added_before_the_jacobian(width, dtype):
    generator = torch.Generator().manual_seed(width)
    embeddings, gradient = torch.randn(2, 1, 9, width, generator=generator)
    embeddings, rows = embeddings.to(dtype), torch.randn(1, 4, width, generator=generator)
    norms = rows_cpp.inverse_norms(embeddings)
    added = AddedRows(rows, torch.tensor([-1, 7, 5, 0, 4, 8, -1, 6, -1]), first_row=5)
    ours, expected = torch.empty(1, 9, width), torch.empty(1, 9, width)
    rows_torch.project_gradient(gradient, embeddings, norms, expected, False, None, added)
    summed = gradient.index_add(1, torch.tensor([2, 7, 1, 5]), rows)
    in_two_steps = torch.empty_like(expected)
    rows_torch.project_gradient(summed, embeddings, norms, in_two_steps, False)
    assert torch.equal(expected, in_two_steps)
    rows_cpp.project_gradient(gradient, embeddings, norms, ours, False, None, added)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_given_tokens_receive_a_gradient(dtype):
    generator = torch.Generator().manual_seed(0)
    embeddings, gradient = torch.randn(1, 9, 20, generator=generator).to(dtype), torch.randn(1, 4, 20)
    norms, tokens = rows_cpp.inverse_norms(embeddings), torch.tensor([7, 0, 3, 8])
    ours, expected = torch.full((1, 9, 20), 5.0), torch.full((1, 9, 20), 5.0)
    rows_torch.project_gradient(gradient, embeddings, norms, expected, False, tokens=tokens)
    rows_cpp.project_gradient(gradient, embeddings, norms, ours, False, tokens=tokens)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)
    assert (ours == 5.0).all(-1).sum() == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 8), (70, 150), (130, 130)])
def test_what_is_between_two_rows_is_added(rows, tokens, dtype):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(1, rows, tokens, generator=generator).to(dtype)
    order = torch.randperm(tokens, generator=generator)
    own, others = order[:rows].sort().values, order[rows:].sort().values
    row_of = torch.full((tokens,), -1).index_copy(0, own, torch.arange(rows))
    rest = torch.empty(1, rows, tokens + 3, dtype=dtype)[..., : tokens - rows]
    ours, truth, true_rest = x.clone(), x.clone(), rest.clone()
    rows_torch.fold(truth, own, row_of, others, true_rest)
    rows_cpp.fold(ours, own, row_of, others, rest)
    assert torch.equal(ours, truth) and torch.equal(rest, true_rest) and torch.equal(rest, x[..., others])
    pairs = x[0][:, own].float()
    assert torch.equal(ours[0][:, own], (pairs + pairs.mT).to(dtype))


@pytest.mark.parametrize("definition", [None, *DEFINITIONS], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(definition):
    threads, results = torch.get_num_threads(), []
    drawn = Drawn(0, [30, 7, 1, 22], 0.07, [0, 60], definition=definition, matches=200)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(drawn.results(rows_cpp, torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)

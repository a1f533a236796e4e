"""The forward pass that stores no similarities, against the row operations of PyTorch and against the naive loss."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.problems import problems, random_problem

from gasp_fast.kernels import product_statistics, rows_torch
from gasp_fast.kernels.chunk import ChunkMatches, FrameStatistics, MatchTerms, Problem, RowChunk, TermDefinition
from gasp_fast.kernels.chunked import ChunkedEngine
from gasp_fast.kernels.index import MatchIndex, RowIndex, SequenceSpan
from gasp_fast.loss.naive import naive_loss

pytestmark = pytest.mark.usefixtures("poisoned_memory")
drawn = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def posed(
    sequences: list[list[int]],
    *,
    layers: int = 2,
    rows: int = 9,
    embedding_width: int = 24,
    values: int = 1,
    keys: bool = False,
    exclude_own: bool = True,
    temperature: float = 0.07,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    frame_offsets = torch.tensor([0, *[size for frames in sequences for size in frames]]).cumsum(0)
    sequence_offsets = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    tokens = int(frame_offsets[-1])

    def normal(*shape: int) -> torch.Tensor:  # whole numbers: dot products are exact, equal tokens equally similar
        return (100 * torch.randn(*shape, generator=generator)).round()

    embeddings = normal(layers, tokens, embedding_width).to(dtype)
    embeddings[:, tokens // 2 :] = embeddings[:, : tokens - tokens // 2].clone()  # equals: the first is best
    known = (torch.rand(tokens, generator=generator) < 0.5).float() if values else None
    return Problem(
        embeddings=embeddings,
        keys=normal(layers, tokens, embedding_width).to(dtype) if keys else embeddings,
        rows=RowIndex.build(
            torch.randperm(tokens, generator=generator)[:rows].sort().values, frame_offsets, sequence_offsets
        ),
        temperature=torch.tensor(temperature),
        values=None if known is None else known[:, None] * normal(tokens, values) / 100,
        known=known,
        exclude_own=exclude_own,
    )


def reference(problem: Problem) -> FrameStatistics:
    return ChunkedEngine(operations=rows_torch, workspace_bytes=1 << 24).frame_match(problem)


def assert_same(ours: FrameStatistics, truth: FrameStatistics, tolerance: float = 2e-5) -> None:
    for name in truth._fields:
        torch.testing.assert_close(
            getattr(ours, name), getattr(truth, name), rtol=tolerance, atol=tolerance, msg=lambda text, n=name: n + text
        )


@given(
    sequences=st.lists(
        st.lists(st.sampled_from([0, 1, 2, 5, 31, 32, 33, 70]), min_size=1, max_size=5), min_size=1, max_size=3
    ).filter(lambda sequences: sum(map(sum, sequences)) > 0),
    layers=st.integers(1, 2),
    rows=st.sampled_from([1, 9, 40]),
    embedding_width=st.sampled_from([3, 16, 24, 50]),
    values=st.sampled_from([0, 1, 3]),
    keys=st.booleans(),
    exclude_own=st.booleans(),
    temperature=st.sampled_from([0.005, 0.02, 0.07, 1.0]),
    seed=st.integers(0, 2**20),
)
@drawn
def test_statistics_are_those_of_pytorch(temperature: float, **drawn_sizes) -> None:
    problem = posed(temperature=temperature, **drawn_sizes)
    # A similarity is at most 1 / temperature, and its rounding error grows with it.
    assert_same(product_statistics.frame_match(problem), reference(problem), 2e-5 * max(1.0, 0.07 / temperature))


@pytest.mark.parametrize("temperature", [0.01, 0.07])
def test_long_frames_are_cut_and_merged(temperature: float) -> None:
    """Some rows are equal to two tokens, in different slices: the first is best."""
    sizes = [[40, 1300, 3], [700]]
    problem = posed(sizes, layers=1, rows=40, values=3, exclude_own=False, temperature=temperature)
    assert_same(product_statistics.frame_match(problem), reference(problem), 1e-4)


def test_a_value_far_below_the_maximum_is_not_lost() -> None:
    """At this temperature the known tokens have a share of exp(-200) of the softmax over all."""
    problem = posed([[8, 4]], layers=1, rows=1, values=1, temperature=0.01)
    problem.embeddings[0] = torch.tensor([[1.0, 0.0]]).repeat(12, 12)
    problem.embeddings[0, 1:8] *= -1
    assert problem.known is not None and problem.values is not None
    problem.known[:] = torch.arange(12) > 0
    problem.values[:, 0] = torch.arange(12)
    assert_same(product_statistics.frame_match(problem), reference(problem))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("embedding_width", [80, 1088])
@pytest.mark.parametrize("values", [1, 3])
def test_half_precision_embeddings_are_multiplied_exactly(
    dtype: torch.dtype, embedding_width: int, values: int
) -> None:
    """With the tiles that a GPU uses for wide and narrow embeddings, and for many values."""
    problem = posed([[30, 5], [290, 70]], dtype=dtype, embedding_width=embedding_width, values=values)
    exact = posed([[30, 5], [290, 70]], embedding_width=embedding_width, values=values)
    exact.embeddings.copy_(problem.embeddings)
    assert_same(product_statistics.frame_match(problem), reference(exact))


def test_two_runs_agree_to_the_last_bit() -> None:
    problem = posed([[40, 1300, 3], [33, 64]], layers=2, rows=20, values=3)
    first, second = product_statistics.frame_match(problem), product_statistics.frame_match(problem)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_nan_reaches_the_frames_that_contain_it_and_no_others() -> None:
    problem = posed([[5, 40, 6]], layers=1, rows=3, values=0)
    problem.rows.row_token.clamp_(max=4)
    problem.embeddings[:, 20] = float("nan")
    lse = product_statistics.frame_match(problem).lse
    assert lse[..., 1].isnan().all() and lse[..., [0, 2]].isfinite().all()


@given(problems(largest_frame=40, most=(2, 2, 4, 30)), st.booleans())
@drawn
def test_terms_are_those_of_the_naive_loss(problem, cold: bool) -> None:
    matches = problem.matches
    index: MatchIndex = matches.index
    temperature = 0.02 if cold else problem.temperature
    embeddings = problem.embeddings.float()
    keys = embeddings if problem.keys is None else problem.keys.float()
    terms = MatchTerms.empty(embeddings.shape[0], len(matches), torch.device("cpu"))
    definition = TermDefinition(problem.negatives, problem.other_targets, 1e-6)
    own = problem.negatives == "sequence"
    stated = Problem(embeddings, keys, index.rows, torch.tensor(temperature), index.values, index.known, own)
    product_statistics.match_terms(stated, index, terms, definition)
    truth = naive_loss(
        embeddings.double(), matches, temperature, problem.negatives, reduction="none",
        keys=None if problem.keys is None else keys.double(), other_targets=problem.other_targets,
    )  # fmt: skip
    tolerance = 2e-5 * max(1.0, 0.07 / temperature)
    for name in ("corr", "depth", "confidence"):
        ours, expected = getattr(terms, name).double(), getattr(truth, name)
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("negatives", ["sequence", "frame"])
@pytest.mark.parametrize("other_targets", ["negatives", "ignored"])
@pytest.mark.parametrize("temperature", [0.01, 0.07])
def test_statistics_with_matches_are_those_of_pytorch(negatives: str, other_targets: str, temperature: float) -> None:
    """Cells in which a row has no match are blanked alike; frames are longer than a block, and cut."""
    drawn_problem = random_problem(3, [[40, 3, 0, 33, 9], [70, 700]], width=10, matches=60, layers=2, planted=0.5)
    index, embeddings = drawn_problem.matches.index, drawn_problem.embeddings.float()
    tau, own = torch.tensor(temperature), negatives == "sequence"
    problem = Problem(embeddings, embeddings, index.rows, tau, index.values, index.known, own)
    definition = TermDefinition(negatives, other_targets, 1e-6)
    whole = slice(0, index.rows.row_token.shape[0])
    positive = torch.empty(2, 60)
    ours = product_statistics.frame_statistics(problem, ChunkMatches.of(index, whole, positive, None, definition))
    expected = torch.empty(2, 60)
    norms = rows_torch.inverse_norms(embeddings)
    for sequence in index.rows.sequences:
        tokens, rows = slice(*sequence.tokens), slice(*sequence.rows)
        chunk = _chunk(problem, norms, sequence, tokens, rows)
        matches = ChunkMatches.of(index, rows, expected, None, definition)
        truth = rows_torch.frame_statistics(chunk, matches, None)
        place = slice(None), rows, slice(0, sequence.frame_count)
        assert_same(FrameStatistics(*(value[place] for value in ours)), truth, 1e-4)
    torch.testing.assert_close(positive, expected, rtol=1e-5, atol=1e-4)


def _chunk(problem: Problem, norms: torch.Tensor, sequence: SequenceSpan, tokens: slice, rows: slice) -> RowChunk:
    own = problem.rows.row_token[rows]
    assert problem.values is not None and problem.known is not None
    return RowChunk(
        similarity=problem.embeddings[:, own] @ problem.keys[:, tokens].mT,
        row_scale=norms[:, own],
        token_scale=norms[:, tokens],
        temperature=problem.temperature,
        row_token=own,
        exclude_own=problem.exclude_own,
        first_token=tokens.start,
        frame_offsets=problem.rows.frame_columns(sequence),
        first_column=0,
        values=problem.values[tokens],
        known=problem.known[tokens],
    )

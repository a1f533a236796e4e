"""The row operations of the CPU extension, called one by one."""

import pytest
import torch
from support.problems import random_problem

from gasp_fast.kernels import rows_cpp, rows_torch
from gasp_fast.kernels.chunk import MatchRuns, MatchTerms, RowChunk, TermWeights

PROBLEM = random_problem(0, [[30, 7, 1, 22]], layers=1, width=16, matches=200)
EMBEDDINGS = PROBLEM.embeddings.float()
ROWS = PROBLEM.matches.index.rows.row_token
SIMILARITY = EMBEDDINGS[:, ROWS] @ EMBEDDINGS.mT  # [1, R, n]


def all_results(operations, negatives):
    """What each of the five operations writes, in turn, from the same similarities."""
    index = PROBLEM.matches.index
    norms = operations.inverse_norms(EMBEDDINGS)
    chunk = RowChunk(
        similarity=SIMILARITY,
        row_scale=norms[:, ROWS],
        token_scale=norms,
        temperature=torch.tensor(0.07),
        own_token=ROWS,
        exclude_own=True,
        frame_offsets=index.rows.frame_offsets,
        values=index.values,
        known=index.known,
    )
    runs, count = MatchRuns.of(index), len(PROBLEM.matches)
    weights = TermWeights(torch.linspace(-1, 2, count)[None], torch.linspace(2, -1, count)[None])
    statistics = operations.frame_statistics(chunk, runs, every_frame=negatives == "sequence")
    terms = MatchTerms.empty(1, count, torch.device("cpu"))
    upstream = operations.loss_terms(chunk, statistics, runs, weights, terms, negatives, 1e-6)
    x, gradient = torch.empty_like(SIMILARITY), torch.empty_like(EMBEDDINGS)
    operations.similarity_gradient(chunk, statistics, upstream, runs, weights, x)
    operations.project_gradient(EMBEDDINGS.flip(1), EMBEDDINGS, norms, gradient)
    return [norms, *statistics, *terms, *upstream, x, gradient]


@pytest.mark.parametrize("negatives", ["sequence", "frame"])
def test_each_operation_is_that_of_the_definition(negatives):
    for ours, truth in zip(all_results(rows_cpp, negatives), all_results(rows_torch, negatives), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_the_number_of_threads_does_not_change_a_bit():
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(all_results(rows_cpp, "sequence"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))

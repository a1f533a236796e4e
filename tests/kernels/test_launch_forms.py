"""A launch names its form: launches that need different compiled kernels have different forms.

A direct kernel is looked up by the `form` that its launch gives, not by the types of its arguments. Were a form to
leave something out, a kernel would run with arguments that it was not compiled for. Nothing is launched here.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from gasp_fast.kernels import rows_triton
from gasp_fast.kernels.chunk import FrameUpstream, MatchTerms, Problem, TermDefinition, TermWeights
from gasp_fast.kernels.chunked import ChunkedEngine, Gradients
from gasp_fast.kernels.index import MatchIndex
from gasp_fast.kernels.products import Products
from gasp_fast.kernels.triton_launch import form_of

TOKENS, PER_FRAME, WIDTH = 12, 4, 8


def index_of(depth: Tensor | None) -> MatchIndex:
    return MatchIndex.build(
        frame_offsets=torch.arange(0, TOKENS + 1, PER_FRAME),
        sequence_offsets=torch.tensor([0, TOKENS // PER_FRAME]),
        anchor=torch.tensor([0, 1, 5, 9]),
        target=torch.tensor([5, 9, 0, 1]),
        target_depth=None if depth is None else depth[:4],
        countable=torch.ones(4, dtype=torch.bool),
        patch_depth=depth,
        known=torch.ones(TOKENS, dtype=torch.bool),
        weight=None,
    )


def every_call(dtype: torch.dtype, has_keys: bool, exclude_own: bool, has_values: bool, workspace: int) -> None:
    """Losses with and without gradients, and statistics with theirs."""
    embeddings = torch.ones(2, TOKENS, WIDTH, dtype=dtype)
    keys = torch.ones_like(embeddings) if has_keys else embeddings
    index = index_of(torch.ones(TOKENS))
    values, known = (index.values, index.known) if has_values else (None, None)
    problem = Problem(embeddings, keys, index.rows, torch.tensor(0.1), values, known, exclude_own)
    gradient = torch.zeros_like(embeddings)
    gradients = Gradients(gradient, torch.zeros_like(keys) if has_keys else gradient, True)
    engine = ChunkedEngine(operations=rows_triton, workspace_bytes=workspace)
    for negatives, others, eps in itertools.product(("sequence", "frame"), ("negatives", "ignored"), (0, 1e-6)):
        definition, terms = TermDefinition(negatives, others, eps), MatchTerms.empty(2, 4, embeddings.device)
        weights = TermWeights(torch.ones(2, 4), torch.ones(2, 4))
        engine.terms_and_gradients(problem, index, None, terms, definition, Gradients())
        engine.terms_and_gradients(problem, index, weights, terms, definition, gradients)
    statistics = engine.frame_match(problem)
    upstream = FrameUpstream(torch.ones_like(statistics.lse), torch.ones_like(statistics.expected))
    engine.frame_match_gradient(problem, statistics, upstream, gradients)


def test_equal_forms_have_equal_types(monkeypatch: pytest.MonkeyPatch) -> None:
    types_of: dict[Any, Any] = {}

    def record(kernel: Any, grid: Any, tile: Any, *arguments: Any, form: Any, **constants: Any) -> None:
        key = (id(kernel), tile, form, *constants.values())
        assert types_of.setdefault(key, form_of(arguments)) == form_of(arguments), (kernel.function.__name__, form)

    monkeypatch.setattr(rows_triton, "launch", record)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ways = Products(dtype, converts=False, wide_result=True)  # as on a GPU
        monkeypatch.setattr(Products, "of", staticmethod(lambda embeddings, ways=ways: ways))
        for name in ("similarity", "row_gradient", "token_gradient"):
            monkeypatch.setattr(Products, name, lambda *arguments, **options: None)
        for switches in itertools.product((False, True), repeat=3):
            for workspace in (1 << 20, 500, 150):  # whole rows; columns that are cut; rows, too
                every_call(dtype, *switches, workspace)
    assert len({key[0] for key in types_of}) == 7  # each kernel

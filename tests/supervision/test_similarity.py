"""The mean cosine of a layer's embeddings is that of all pairs of tokens, and nothing of `N x N` is computed."""

from dataclasses import replace

import pytest
import torch

from gasp_fast.loss.matches import Matches
from gasp_fast.supervision.similarity import mean_cosines

SIZES = ((5, 3), (4, 4, 6), (2, 2))  # tokens of the frames of each sequence


def matches_of(counts, weight=None):
    """So many matches of the first token of each sequence with tokens of its second frame, in no order."""
    parts = [
        Matches(
            frame_offsets=torch.tensor([0, *sizes]).cumsum(0),
            anchor=torch.zeros(count, dtype=torch.long),
            target=sizes[0] + torch.arange(count) % sizes[1],
        )
        for sizes, count in zip(SIZES, counts, strict=True)
    ]
    packed = Matches.pack(parts)
    mixed = torch.arange(len(packed)).flip(0)
    weight = None if weight is None else weight[mixed]
    return replace(packed, anchor=packed.anchor[mixed], target=packed.target[mixed], weight=weight)


def all_pairs(rows):
    unit = torch.nn.functional.normalize(rows.double(), dim=-1)
    cosines = unit @ unit.T
    return float(cosines[~torch.eye(len(rows), dtype=torch.bool)].mean())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    ("counts", "weight", "shares"),
    [
        ((3, 1, 0), None, (3 / 4, 1 / 4, 0)),
        ((1, 2, 1), torch.tensor([1.0, 0.5, 2.5, 4.0]), (1 / 8, 3 / 8, 1 / 2)),
        ((0, 0, 0), None, (0, 0, 0)),
    ],
)
def test_the_mean_cosine_is_that_of_all_pairs_of_each_sequence(dtype, tolerance, counts, weight, shares):
    torch.manual_seed(0)
    embeddings = (torch.randn(3, 26, 16) + torch.tensor([0.0, 0.5, 3.0])[:, None, None]).to(dtype)
    embeddings[1, 2] = 0  # a token without direction
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):  # as in a training step
        found = mean_cosines(embeddings, matches_of(counts, weight))
    parts = [layer.split([sum(sizes) for sizes in SIZES]) for layer in embeddings]
    expected = [sum(share * all_pairs(rows) for share, rows in zip(shares, part, strict=True)) for part in parts]
    assert found.tolist() == pytest.approx(expected, abs=tolerance)


def test_tokens_of_one_direction_have_a_cosine_of_one():
    embeddings = torch.rand(1, 26, 1) * torch.randn(16)
    assert mean_cosines(embeddings, matches_of((1, 1, 1))).tolist() == pytest.approx([1.0])


def test_no_tokens_have_a_cosine_of_zero():
    none = torch.zeros(0, dtype=torch.long)
    matches = Matches(frame_offsets=torch.zeros(2, dtype=torch.long), anchor=none, target=none)
    assert mean_cosines(torch.zeros(2, 0, 16), matches).tolist() == [0, 0]

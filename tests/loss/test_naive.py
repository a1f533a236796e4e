"""`naive_loss` on problems small enough to solve by hand, one test for each rule of the definition.

Embeddings are unit vectors, equal or orthogonal, so a similarity is 1 / tau or 0. With tau = 1 / log 2 an equal token
counts 2 in every sum of exponentials and an orthogonal one 1.
"""

import math

import pytest
import torch

from gasp_fast import Matches
from gasp_fast.loss.naive import naive_loss

TAU = 1 / math.log(2)
LOG2 = math.log(2)
X, Y, Z = torch.eye(3, dtype=torch.float64)


def matches(frame_offsets, pairs, **options):
    anchor, target = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous()
    return Matches(frame_offsets=torch.tensor(frame_offsets), anchor=anchor, target=target, **options)


def naive(tokens, problem, **options):
    return naive_loss(torch.stack(tokens)[None], problem, TAU, **options)


def test_sequence_negatives_are_all_tokens_but_the_anchor():
    # Frames {0, 1}, {2, 3}; token 0 is matched with 2, which is equal to it. Others: 1 equal, 3 orthogonal.
    out = naive([X, X, X, Y], matches([0, 2, 4], [(0, 2)]))
    assert out.corr.item() == pytest.approx(-LOG2 + math.log(2 + 2 + 1))


def test_frame_negatives_are_the_tokens_of_the_targets_frame():
    out = naive([X, X, X, Y], matches([0, 2, 4], [(0, 2)]), negatives="frame")
    assert out.corr.item() == pytest.approx(-LOG2 + math.log(2 + 1))


def test_other_sequences_do_not_count():
    # The same frames twice, as two sequences.
    both = matches([0, 2, 4, 6, 8], [(0, 2), (4, 7)], sequence_offsets=torch.tensor([0, 2, 4]))
    out = naive([X, X, X, Y, X, X, X, Y], both)
    assert out.corr[0].tolist() == pytest.approx([-LOG2 + math.log(5), math.log(5)])


def test_embeddings_are_normalised():
    out = naive([3 * X, 0.1 * X, 7 * X, 1e-3 * Y], matches([0, 2, 4], [(0, 2)]))
    assert out.corr.item() == pytest.approx(-LOG2 + math.log(5))


def test_expected_depth_is_the_softmax_over_known_tokens():
    # Frame {1, 2, 3}: equal at depth 4, orthogonal at depth 1, and one of unknown depth. (2 * 4 + 1 * 1) / 3 = 3.
    for unknown in (0.0, -1.0, math.nan, math.inf):
        depths = {"target_depth": torch.tensor([5.0]), "patch_depth": torch.tensor([9.0, 4.0, 1.0, unknown])}
        out = naive([X, X, Y, X], matches([0, 1, 4], [(0, 1)], **depths), eps=0.25)
        assert out.depth.item() == pytest.approx(2 / 8.25)
        assert out.has_depth.tolist() == [True]


@pytest.mark.parametrize(
    "depths",
    [
        {},
        {"target_depth": torch.tensor([5.0])},
        {"patch_depth": torch.ones(3)},
        {"target_depth": torch.tensor([math.nan]), "patch_depth": torch.ones(3)},
        {"target_depth": torch.tensor([math.inf]), "patch_depth": torch.ones(3)},
        {"target_depth": torch.tensor([0.0]), "patch_depth": torch.ones(3)},
        {"target_depth": torch.tensor([5.0]), "patch_depth": torch.tensor([1.0, 0.0, math.nan])},
        {"target_depth": torch.tensor([5.0]), "patch_depth": torch.ones(3), "depth_valid": torch.tensor([False])},
    ],
)
def test_a_match_without_depth_has_a_term_of_zero(depths):
    embeddings = torch.stack([X, X, Y])[None].requires_grad_()
    out = naive_loss(embeddings, matches([0, 1, 3], [(0, 1)], **depths), TAU)
    assert out.depth.item() == 0.0 and out.has_depth.tolist() == [False]
    out.loss.backward()
    assert embeddings.grad.isfinite().all()


TWO = matches(  # the second match has no depth term
    [0, 2, 4], [(0, 2), (1, 3)], target_depth=torch.tensor([5.0, math.nan]), patch_depth=torch.tensor([1.0, 1, 3, 3])
)
CORR, DEPTH = [-LOG2 + math.log(5), math.log(5)], [2 / 8, 0.0]  # of embeddings X, X, X, Y: a frame of depth 3


@pytest.mark.parametrize(
    ("reduction", "loss"),
    [
        ("mean", 0.5 * sum(CORR) / 2 + 2 * DEPTH[0]),
        ("sum", 0.5 * sum(CORR) + 2 * DEPTH[0]),
        ("none", [0.5 * CORR[0] + 2 * DEPTH[0], 0.5 * CORR[1]]),
    ],
)
def test_terms_become_a_loss(reduction, loss):
    options = {"corr_weight": 0.5, "depth_weight": 2.0, "eps": 1e-12, "reduction": reduction}
    out = naive([X, X, X, Y], TWO, **options)
    assert out.corr[0].tolist() == pytest.approx(CORR) and out.depth[0].tolist() == pytest.approx(DEPTH)
    assert out.loss.flatten().tolist() == pytest.approx(loss if isinstance(loss, list) else [loss])
    # Two layers: their mean (each its own under "none"), or the sum by weight.
    twice = torch.stack([X, X, X, Y]).expand(2, -1, -1)
    layers = naive_loss(twice, TWO, TAU, **options).loss
    assert torch.allclose(layers, out.loss.expand_as(layers))
    weighted = naive_loss(twice, TWO, TAU, layer_weights=torch.tensor([3.0, -1.0]), **options).loss
    assert float(weighted.sum()) == pytest.approx(2 * float(out.loss.sum()))


@pytest.mark.parametrize(
    ("weight", "loss"),
    [([3.0, 1.0], 0.5 * (3 * CORR[0] + CORR[1]) / 4 + 2 * DEPTH[0]), ([0.0, 2.0], 0.5 * CORR[1]), ([0.0, 0.0], 0.0)],
)
def test_a_mean_is_weighted_by_match(weight, loss):
    weighted = matches(
        [0, 2, 4], [(0, 2), (1, 3)], target_depth=TWO.target_depth, patch_depth=TWO.patch_depth,
        weight=torch.tensor(weight),
    )  # fmt: skip
    options = {"corr_weight": 0.5, "depth_weight": 2.0, "eps": 1e-12}
    assert naive([X, X, X, Y], weighted, **options).loss.item() == pytest.approx(loss)
    terms = [0.5 * CORR[0] + 2 * DEPTH[0], 0.5 * CORR[1]]
    assert naive([X, X, X, Y], weighted, reduction="none", **options).loss[0].tolist() == pytest.approx(terms)
    total = sum(w * term for w, term in zip(weight, terms, strict=True))
    assert naive([X, X, X, Y], weighted, reduction="sum", **options).loss.item() == pytest.approx(total)


def test_candidates_are_keys():
    # The anchor is X of the embeddings; the keys are X, X, Y, Z. Its own token, key 0, is left out.
    embeddings, keys = torch.stack([X, Z, Z, Z])[None], torch.stack([X, X, Y, Z])[None]
    out = naive_loss(embeddings, matches([0, 2, 4], [(0, 2)]), TAU, keys=keys)
    assert out.corr.item() == pytest.approx(math.log(2 + 1 + 1))
    assert out.best.tolist() == [[2]]


def test_other_targets_can_be_ignored():
    # Anchor 0 has the targets 2 and 3 (twice) in one frame and 5 in another. Negatives: 1 (equal), 4 (orthogonal).
    problem = matches([0, 2, 5, 6], [(0, 2), (0, 3), (0, 3), (0, 5)])
    out = naive([X, X, X, Y, Y, X], problem, other_targets="ignored")
    equal, orthogonal = -LOG2 + math.log(2 + 1 + 2), math.log(2 + 1 + 1)
    assert out.corr[0].tolist() == pytest.approx([equal, orthogonal, orthogonal, equal])
    in_frame = naive([X, X, X, Y, Y, X], problem, other_targets="ignored", negatives="frame")
    assert in_frame.corr[0].tolist() == pytest.approx([-LOG2 + math.log(2 + 1), math.log(1 + 1), math.log(1 + 1), 0.0])


def test_best_is_the_most_similar_token_of_the_targets_frame():
    out = naive([X, Y, Z, X, Y], matches([0, 2, 5], [(0, 2)]))
    assert out.best.tolist() == [[3]]
    assert out.confidence.item() == pytest.approx(2 / 4)


def test_no_match_is_no_loss():
    embeddings = torch.stack([X, Y])[None].requires_grad_()
    out = naive_loss(embeddings, matches([0, 1, 2], []), TAU)
    out.loss.backward()
    assert out.loss.item() == 0.0 and embeddings.grad.abs().max() == 0.0

"""`frame_match`: statistics of each query over each frame, on the fast path and on the dense one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import relative_error

import gasp_fast


def by_hand(embeddings, anchors, offsets, sequences, values, known, temperature, exclude):
    """[L, A, P] log-sum-exp and [L, A, P, V] expected values, one cell at a time."""
    unit = torch.nn.functional.normalize(embeddings, dim=-1, eps=1e-12)
    longest = max(b - a for a, b in itertools.pairwise(sequences))
    lse = torch.full((len(embeddings), len(anchors), longest), float("-inf"), dtype=torch.float64)
    expected = torch.zeros(*lse.shape, values.shape[1], dtype=torch.float64)
    best = torch.full(lse.shape, -1)
    for layer in range(len(embeddings)):
        for a, token in enumerate(anchors.tolist()):
            home = next(f for f in range(len(offsets) - 1) if offsets[f] <= token < offsets[f + 1])
            q = next(q for q in range(len(sequences) - 1) if sequences[q] <= home < sequences[q + 1])
            for place, frame in enumerate(range(sequences[q], sequences[q + 1])):
                tokens = [k for k in range(offsets[frame], offsets[frame + 1]) if not (exclude and k == token)]
                if not tokens:
                    continue
                s = (unit[layer, tokens] @ unit[layer, token]) / temperature
                lse[layer, a, place] = s.logsumexp(0)
                best[layer, a, place] = tokens[int(s.argmax())]
                keep = [at for at, k in enumerate(tokens) if known[k]]
                if keep:
                    weight = s[keep].softmax(0)
                    expected[layer, a, place] = weight @ values[[tokens[at] for at in keep]].double()
    return lse, expected, best


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sequences=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=4), min_size=1, max_size=2),
    width=st.integers(1, 4),
    exclude=st.booleans(),
    backend=st.sampled_from(["cpp", "torch"]),
)
def test_statistics_and_gradients_are_those_by_hand(seed, sequences, width, exclude, backend):
    sizes = [size for frames in sequences for size in frames]
    sizes[0] += 1
    generator = torch.Generator().manual_seed(seed)
    offsets = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    ends = [0, *torch.tensor([len(frames) for frames in sequences]).cumsum(0).tolist()]
    tokens = offsets[-1]
    embeddings = torch.randn(2, tokens, 6, generator=generator, dtype=torch.float64)
    anchors = torch.randint(tokens, (5,), generator=generator)  # any order, repeats
    values = torch.randn(tokens, width, generator=generator)
    known = torch.rand(tokens, generator=generator) < 0.7
    poisoned = torch.where(known[:, None], values, float("nan"))  # unknown values must not be read

    dtype = torch.float64 if backend == "torch" else torch.float32
    fast = embeddings.to(dtype).clone().requires_grad_()
    tau = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    ours = gasp_fast.frame_match(
        fast,
        anchors,
        torch.tensor(offsets),
        values=poisoned.to(dtype),
        known=known,
        sequence_offsets=torch.tensor(ends),
        temperature=tau,
        exclude_anchor=exclude,
        backend=backend,
    )
    slow = embeddings.clone().requires_grad_()
    slow_tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    lse, expected, best = by_hand(slow, anchors, offsets, ends, values, known, slow_tau, exclude)

    assert torch.equal(ours.best, best)
    assert torch.equal(ours.lse.isinf(), lse.isinf())
    finite = lse.isfinite()
    assert torch.allclose(ours.lse[finite].double(), lse[finite], rtol=1e-5, atol=1e-6)
    assert torch.allclose(ours.expected.double(), expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
    pulls = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for a, b, leaf, temperature in ((ours.lse, ours.expected, fast, tau), (lse, expected, slow, slow_tau)):
        total = (weights.to(a.dtype) * a)[finite].sum() + (pulls.to(b.dtype) * b).sum()
        (total + 0 * (leaf.sum() + temperature)).backward()  # connected even where every frame is empty
    natural = float((weights.abs().sum() + pulls.abs().sum()) / 0.3)
    assert relative_error(fast.grad, slow.grad, natural) < 1e-5
    assert relative_error(tau.grad, slow_tau.grad, natural / 0.3) < 1e-5


def test_soft_argmax_of_coordinates_is_the_same_call():
    """x, y and depth at once; with features that are unmistakable the answer is the true position."""
    columns = rows = 6
    xy = torch.stack(torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy"), dim=-1).view(-1, 2)
    features = torch.randn(36, 64, generator=torch.Generator().manual_seed(0))
    move = torch.randperm(36, generator=torch.Generator().manual_seed(1))
    embeddings = torch.cat([features, features[move]])
    values = torch.cat([xy, xy]).float()
    depth = torch.rand(72, 1, generator=torch.Generator().manual_seed(2))
    ours = gasp_fast.frame_match(
        embeddings,
        torch.arange(36),
        torch.tensor([0, 36, 72]),
        values=torch.cat([values, depth], dim=1),
        temperature=0.01,
    )
    went = torch.argsort(move)
    assert torch.allclose(ours.expected[0, :, 1, :2], xy[went].float(), atol=1e-3)
    assert torch.allclose(ours.expected[0, :, 1, 2], depth[36:][went, 0], atol=1e-3)
    assert torch.equal(ours.best[0, :, 1], 36 + went)
    assert (ours.confidence[0, :, 1] > 0.99).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"anchors": torch.tensor([9])}, "anchors[0] = 9"),
        ({"frame_offsets": torch.tensor([0, 4, 8])}, "frame_offsets ends at 8"),
        ({"sequence_offsets": torch.tensor([0, 1])}, "sequence_offsets ends at 1"),
        ({"known": torch.ones(9, dtype=torch.bool)}, "known is given without values"),
        ({"values": torch.ones(8)}, "values has 8 entries"),
        ({"values": torch.ones(9, dtype=torch.long)}, "values has dtype torch.int64"),
        ({"values": torch.ones(9, requires_grad=True)}, "values requires grad"),
        ({"values": torch.ones(9), "known": torch.ones(9)}, "known has dtype torch.float32"),
        ({"temperature": -2.0}, "temperature = -2.0"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    good = {"anchors": torch.tensor([0]), "frame_offsets": torch.tensor([0, 4, 9])}
    with pytest.raises((ValueError, TypeError)) as caught:
        gasp_fast.frame_match(torch.randn(9, 4), **{**good, **arguments})
    assert words in str(caught.value)

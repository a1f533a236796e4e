"""Random problems for the loss, and the error that is allowed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import gasp_fast


@dataclass(frozen=True)
class Problem:
    embeddings: Tensor  # float64 [L, N, D]
    matches: gasp_fast.Matches
    temperature: float
    negatives: str
    keys: Tensor | None = None  # float64 [L, N, D]
    other_targets: str = "negatives"
    metric: Tensor | None = None  # float64 [L, D, D], positive definite

    def __repr__(self) -> str:  # hypothesis prints failing examples
        offsets = self.matches.frame_offsets.tolist()
        return (
            f"Problem(shape={list(self.embeddings.shape)}, offsets={offsets}, {self.matches}, tau={self.temperature}, "
            f"keys={self.keys is not None}, metric={self.metric is not None}, other_targets={self.other_targets})"
        )


def random_problem(
    seed: int,
    sequences: list[list[int]],  # tokens of each frame of each sequence
    *,
    layers: int = 2,
    width: int = 16,
    matches: int = 12,
    temperature: float = 0.07,
    negatives: str = "sequence",
    holes: float = 0.3,
    planted: float = 0.0,  # how much of its target's direction each anchor carries
    scale: float = 1.0,
    keys: bool = False,
    weighted: bool = False,
    other_targets: str = "negatives",
    metric: bool = False,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    sizes = [size for frames in sequences for size in frames]
    frame_offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    sequence_offsets = torch.tensor([0, *torch.tensor([len(f) for f in sequences]).cumsum(0).tolist()])
    tokens = int(frame_offsets[-1])
    frame_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    sequence_of = torch.searchsorted(sequence_offsets[1:].contiguous(), frame_of, right=True)
    allowed = (frame_of[:, None] != frame_of) & (sequence_of[:, None] == sequence_of)
    pairs = allowed.nonzero()
    count = matches if len(pairs) else 0
    chosen = pairs[torch.randint(max(1, len(pairs)), (count,), generator=generator)] if count else pairs[:0]
    embeddings = torch.randn(layers, tokens, width, generator=generator, dtype=torch.float64)
    own = embeddings.clone()
    for anchor, target in sorted(set(map(tuple, chosen.tolist()))):
        embeddings[:, anchor] += planted * own[:, target]
    patch_depth = 0.5 + 3 * uniform(tokens)
    patch_depth[uniform(tokens) < holes] = 0.0
    patch_depth[uniform(tokens) < holes / 3] = float("nan")
    target_depth = 0.5 + 3 * uniform(count)
    target_depth[uniform(count) < 0.1] = float("inf")
    grid = torch.stack([torch.arange(tokens) % 5, torch.arange(tokens) // 5], dim=1)
    depth_valid = uniform(count) < 0.8
    weight = uniform(count) * (uniform(count) < 0.8) if weighted else None
    drawn_keys = torch.randn(embeddings.shape, generator=generator, dtype=torch.float64) * scale
    factor = torch.randn(layers, width, 2 * width, generator=generator, dtype=torch.float64) / (2 * width) ** 0.5
    identity = torch.eye(width, dtype=torch.float64)
    return Problem(
        embeddings * scale,
        gasp_fast.Matches(
            frame_offsets=frame_offsets,
            sequence_offsets=sequence_offsets if len(sequences) > 1 else None,
            anchor=chosen[:, 0].contiguous(),
            target=chosen[:, 1].contiguous(),
            target_depth=target_depth,
            depth_valid=depth_valid,
            patch_depth=patch_depth,
            token_xy=grid,
            weight=weight,
        ),
        temperature,
        negatives,
        keys=drawn_keys if keys else None,
        other_targets=other_targets,
        metric=(identity + factor @ factor.mT) / 2 if metric else None,
    )


@st.composite
def problems(
    draw: st.DrawFn,
    largest_frame: int = 9,
    widths: tuple[int, ...] = (1, 3, 8, 17, 40),
    most: tuple[int, int, int, int] = (3, 3, 5, 30),  # layers, sequences, frames, matches
) -> Problem:
    """Ragged frames, several sequences, duplicate anchors and matches, holes in depth, one-token and empty frames; with
    and without keys or a metric, weights and ignored targets."""
    layers, most_sequences, most_frames, most_matches = most
    frames = st.lists(st.integers(0, largest_frame), min_size=1, max_size=most_frames)
    sequences = draw(st.lists(frames, min_size=1, max_size=most_sequences))
    if sum(map(sum, sequences)) == 0:
        sequences[0][0] = 1
    beside = draw(st.sampled_from(["", "keys", "metric"]))
    return random_problem(
        draw(st.integers(0, 2**31)),
        sequences,
        layers=draw(st.integers(1, layers)),
        width=draw(st.sampled_from(widths)),
        matches=draw(st.sampled_from([0, 1, 2, 7, most_matches])),
        temperature=draw(st.sampled_from([0.05, 0.07, 0.3, 1.0])),
        negatives=draw(st.sampled_from(["sequence", "frame"])),
        holes=draw(st.sampled_from([0.0, 0.3, 1.0])),
        planted=draw(st.sampled_from([0.0, 0.5, 3.0])),
        scale=draw(st.sampled_from([0.01, 1.0, 30.0])),
        keys=beside == "keys",
        metric=beside == "metric",
        weighted=draw(st.booleans()),
        other_targets=draw(st.sampled_from(["negatives", "ignored"])),
    )


def relative_error(ours: Tensor, truth: Tensor, natural: float = 0.0) -> float:
    """`||ours - truth|| / ||truth||`.

    Some results are (nearly) zero only because their terms cancel; rounding errors do not cancel. Examples: the
    gradient of a one-dimensional embedding, the loss of a match with a single candidate. `natural` is the size of the
    result if nothing cancelled. A result below a twentieth of it is compared with that twentieth, so a tolerance of
    1e-5 is at least 5e-7 of `natural`: a few units in the last place of float32.
    """
    difference = (ours.detach().double() - truth.detach().double()).norm()
    return float(difference / max(float(truth.detach().double().norm()), 0.05 * natural, 1e-30))

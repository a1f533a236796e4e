"""Draws the frames of training sequences, and splits scenes into training and held-out.

A sequence is an anchor frame `t_a`, drawn uniformly from its scene, and `F − 1` others drawn uniformly and without
repetition from `[t_a − 48, t_a + 48]`, with `F` uniform in 8..24. The anchor comes first, because tracks start there;
the others follow in temporal order.

The sampler has no state: a sequence is a function of (seed, epoch, index). So a run resumes exactly from one number,
workers and ranks need no communication, and 1.75 million sequences are planned without being stored. Indices run scene
by scene, so that neighbouring sequences share decoded frames; `mixture.py` shuffles the indices.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from gasp_fast.config.limits import MOST


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """Parameters of the sequence sampler."""

    min_frames: int = 8  # of a sequence; the number is drawn
    max_frames: int = 24  # of a sequence
    window: int = 48  # frames before and after the anchor
    per_scene: int = 16  # sequences of each scene in an epoch
    seed: int = 0  # of the anchors and frames that are drawn

    def __post_init__(self) -> None:
        if not 2 <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"min_frames = {self.min_frames}, max_frames = {self.max_frames}: need 2 <= min_frames <= max_frames"
            )
        if 2 * self.window + 1 < self.max_frames:
            raise ValueError(f"window = {self.window}: too narrow for max_frames = {self.max_frames}; widen it")
        if self.per_scene < 1:
            raise ValueError(f"per_scene = {self.per_scene}: at least 1 sequence a scene")
        for name in ("max_frames", "window", "per_scene"):
            if getattr(self, name) > MOST:
                raise ValueError(f"{name} = {getattr(self, name)}: at most {MOST:,}")


@dataclass(frozen=True)
class FrameSequence:
    """Frames of one scene; `frames[0]` is the anchor."""

    scene: int
    frames: tuple[int, ...]
    drawn_count: int  # of frames; a short scene gives fewer


@dataclass(frozen=True)
class EpochStatistics:
    """Counts of an epoch. A `shortened` sequence has fewer frames than drawn, because its scene is short."""

    sequences: int
    frames: int
    shortened: int
    frames_per_sequence: dict[int, int]  # F -> sequences
    mean_gap: float  # frames between the anchor and another
    coverage: float  # share of all frames that occur in a sequence

    def __str__(self) -> str:
        mean = self.frames / self.sequences
        return (
            f"{self.sequences:,} sequences of {min(self.frames_per_sequence)} to {max(self.frames_per_sequence)} "
            f"frames (mean {mean:.1f}), mean gap to the anchor {self.mean_gap:.1f}, "
            f"{self.coverage:.0%} of all frames seen, {self.shortened:,} sequences shortened"
        )


class SequenceSampler:
    """Draws the sequences of an epoch for scenes of the given lengths."""

    def __init__(self, lengths: Sequence[int], config: SequenceConfig | None = None, names: Sequence[str] = ()) -> None:
        self.config = config or SequenceConfig()
        self.lengths = np.asarray(lengths, np.int32)
        if not len(self.lengths):
            raise ValueError("lengths is empty: give at least one scene")
        short = np.flatnonzero(self.lengths < self.config.min_frames)
        if len(short):
            which = names[short[0]] if names else f"lengths[{short[0]}]"
            raise ValueError(
                f"{which} has {self.lengths[short[0]]} frames, min_frames = {self.config.min_frames} "
                f"({len(short)} such scenes): leave them out or lower min_frames"
            )

    def __len__(self) -> int:
        return len(self.lengths) * self.config.per_scene

    def draw(self, epoch: int, index: int) -> FrameSequence:
        """Sequence `index` of `epoch`."""
        anchor, count, nearby, uniform = self._begin(epoch, index)
        others = sorted((frame for frame in nearby if frame != anchor), key=lambda _: uniform())[: count - 1]
        return FrameSequence(index // self.config.per_scene, (anchor, *sorted(others)), count)

    def frame_count(self, epoch: int, index: int) -> int:
        """The number of frames of that sequence. Takes a tenth of the time of `draw`."""
        _, count, nearby, _ = self._begin(epoch, index)
        return min(count, len(nearby))

    def _begin(self, epoch: int, index: int) -> tuple[int, int, range, Callable[[], float]]:
        """The anchor, the number of frames to draw, those to draw from, and the generator that goes on drawing."""
        if not 0 <= index < len(self):
            raise IndexError(f"index = {index}: the epoch has {len(self)} sequences")
        config = self.config
        length = int(self.lengths[index // config.per_scene])
        # Only `random()`: Python guarantees that a seeded generator gives the same values in every version.
        uniform = random.Random(f"sequence/{config.seed}/{epoch}/{index}").random
        anchor = int(uniform() * length)
        count = config.min_frames + int(uniform() * (config.max_frames - config.min_frames + 1))
        return anchor, count, range(max(0, anchor - config.window), min(length, anchor + config.window + 1)), uniform

    def statistics(self, epoch: int, at_most: int | None = None) -> EpochStatistics:
        """Draws and holds the whole epoch (0.1 ms a sequence), or `at_most` sequences spread evenly over it."""
        count = len(self) if at_most is None else min(at_most, len(self))
        drawn = [self.draw(epoch, number * len(self) // count) for number in range(count)]
        sizes = [len(sequence.frames) for sequence in drawn]
        gaps = sum(abs(frame - sequence.frames[0]) for sequence in drawn for frame in sequence.frames[1:])
        seen = {(sequence.scene, frame) for sequence in drawn for frame in sequence.frames}
        return EpochStatistics(
            sequences=count,
            frames=sum(sizes),
            shortened=sum(len(sequence.frames) < sequence.drawn_count for sequence in drawn),
            frames_per_sequence=dict(sorted(Counter(sizes).items())),
            mean_gap=gaps / (sum(sizes) - count),
            coverage=len(seen) / int(self.lengths.sum(dtype=np.int64)),
        )


def is_held_out(name: str, share: float) -> bool:
    """Whether the scene called `name` belongs to the held-out `share`.

    It depends on the name alone: adding scenes, moving the folder or reading it in another order moves no scene from
    one split to the other.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share = {share}: give the share of the scenes to hold out, from 0 to 1")
    digest = blake2b(f"held-out/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64

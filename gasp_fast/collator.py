"""Where data and model meet: frames and tracks become a batch of pixels and `Matches`.

Frames go through the model's real processor; tracks go through the map of that very processor, from pixels of the
colour image to token indices. Points that a crop cuts off are dropped. Knows the data wing's tracks, a backbone's
grids and the loss's ground truth; knows no scene format, no module of a model and no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gasp_fast.backbones.base import Frame
from gasp_fast.backbones.chat import Message
from gasp_fast.data.depth.patches import pool_depth
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import Tracks
from gasp_fast.loss.matches import Matches

from .backbones import Backbone, Conversation, TokenGrid

Anchors = Literal["first", "all", "pairs"]


@dataclass(frozen=True, kw_only=True)
class CollatorConfig:
    """Which of the matches that tracks imply are supervised.

    A track seen in `n` frames implies `n (n - 1)` ordered matches. `anchors="first"` takes those that start in the
    first frame, where the track's query is; "all" takes every one; "pairs" takes those of `pairs` ordered pairs of
    frames, drawn anew for each sample.
    """

    anchors: Anchors = "all"
    pairs: int = 32
    seed: int = 0  # of the drawn pairs, together with the sample's own position
    prompt: str = "Describe the scene."  # said over frames that come without a conversation

    def __post_init__(self) -> None:
        if self.anchors not in get_args(Anchors):
            raise ValueError(f"anchors = {self.anchors!r} is unknown; choose one of {', '.join(get_args(Anchors))}")
        if self.pairs < 1:
            raise ValueError(f"pairs = {self.pairs} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence before it meets a model: geometry (frames with tracks), language (with messages), or both."""

    frames: Sequence[Frame]
    messages: Sequence[Message] = ()
    tracks: Sequence[Tracks] = ()  # of these frames; several grids (coarse and fine) are supervised together
    depth: Sequence[NDArray[np.floating]] | None = None  # a map for each frame, at any resolution; 0 is unknown
    position: int = 0  # in the stream of samples: what makes drawn pairs reproducible


def geometry_sample(scene: Scene, tracks: Sequence[Tracks], position: int = 0) -> Sample:
    """The sample of one sequence of a scene, for tracks of one or several grids over the same frames."""
    frames = [int(frame) for frame in tracks[0].frames]
    return Sample(
        frames=[scene.image(frame) for frame in frames],
        tracks=tracks,
        depth=[scene.depth(frame) for frame in frames] if scene.has_depth else None,
        position=position,
    )


class Collator:
    """`list[Sample]` -> a dict with the model's inputs (labels included) and two entries of our own:

    - `visual_positions` int64 `[N]`: where in `B * S` the visual tokens of all sequences with tracks are, in the
      order of the matches' token indices;
    - `matches`: the ground truth over those `N` tokens. A batch without tracks has `N = 0` and no match.

    Pickles into loader workers.
    """

    def __init__(self, backbone: Backbone, config: CollatorConfig | None = None) -> None:
        self.backbone = backbone
        self.config = CollatorConfig() if config is None else config

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        for index, sample in enumerate(samples):
            _check(sample, index)
        if self.backbone.one_frame_count:
            fewest = min((len(sample.frames) for sample in samples if sample.frames), default=0)
            samples = [thinned(sample, fewest) for sample in samples]
        spoken: list[Message] = [{"role": "user", "content": self.config.prompt}]
        encoded = self.backbone.encode([Conversation(s.frames, s.messages or spoken) for s in samples])
        geometric = [index for index, sample in enumerate(samples) if sample.tracks]
        parts = [self._matches(samples[index], encoded.grids[index]) for index in geometric]
        positions = [encoded.positions[index] for index in geometric]
        return {
            **encoded.inputs,
            "visual_positions": torch.cat(positions) if positions else torch.zeros(0, dtype=torch.long),
            "matches": Matches.pack(parts) if parts else _no_matches(),
        }

    def _matches(self, sample: Sample, grids: Sequence[TokenGrid]) -> Matches:
        starts = np.concatenate([[0], np.cumsum([grid.tokens for grid in grids])])  # [F + 1]
        before, after = self._frame_pairs(len(grids), sample.position)  # [P], [P]
        anchor, target, depth = [], [], []
        for tracks in sample.tracks:
            tokens = track_tokens(tracks, grids, starts)  # [T, F]
            start, end = tokens[:, before], tokens[:, after]  # [T, P]
            seen = (start >= 0) & (end >= 0)
            anchor.append(start[seen])
            target.append(end[seen])
            depth.append(tracks.depth[:, after][seen])
        return Matches(
            frame_offsets=_tensor(starts, np.int64),
            anchor=_tensor(np.concatenate(anchor), np.int64),
            target=_tensor(np.concatenate(target), np.int64),
            target_depth=_tensor(np.concatenate(depth), np.float32),
            patch_depth=None if sample.depth is None else _tensor(_patch_depth(sample, grids), np.float32),
            token_xy=_tensor(np.concatenate([grid.xy() for grid in grids]), np.int64),
        )

    def _frame_pairs(self, frames: int, position: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ordered pairs of frames that are supervised, as (anchor frames, target frames)."""
        if self.config.anchors == "first":
            return np.zeros(frames - 1, np.int64), np.arange(1, frames)
        before, after = np.nonzero(~np.eye(frames, dtype=bool))
        if self.config.anchors == "pairs" and self.config.pairs < len(before):
            draw = np.random.default_rng([self.config.seed, position])
            chosen = np.sort(draw.choice(len(before), self.config.pairs, replace=False))
            before, after = before[chosen], after[chosen]
        return before, after


def track_tokens(tracks: Tracks, grids: Sequence[TokenGrid], starts: NDArray[np.integer]) -> NDArray[np.int64]:
    """The token of each tracked point in each frame, `[T, F]`, counted over all frames of the sequence from `starts`;
    -1 where the point is not visible or has no token."""
    tokens = np.stack([grid.locate(tracks.uv[:, f]) for f, grid in enumerate(grids)], axis=1)
    return np.where(tracks.visible & (tokens >= 0), tokens + starts[:-1], -1)


def thinned(sample: Sample, count: int) -> Sample:
    """The sample with `count` of its frames: the first one and others at even steps. Text alone stays as it is."""
    if len(sample.frames) in (0, count):
        return sample
    kept = np.linspace(0, len(sample.frames) - 1, count).round().astype(int)
    return replace(
        sample,
        frames=[sample.frames[f] for f in kept],
        tracks=[_through(tracks, kept) for tracks in sample.tracks],
        depth=None if sample.depth is None else [sample.depth[f] for f in kept],
    )


def _through(tracks: Tracks, kept: NDArray[np.integer]) -> Tracks:
    """The tracks through some of their frames."""
    return replace(
        tracks,
        frames=tracks.frames[kept],
        uv=tracks.uv[:, kept],
        visible=tracks.visible[:, kept],
        depth=tracks.depth[:, kept],
        negative_uv=None if tracks.negative_uv is None else tracks.negative_uv[:, kept],
    )


def _patch_depth(sample: Sample, grids: Sequence[TokenGrid]) -> NDArray[np.float32]:
    """Mean known depth of every token's patch, `[N]`; 0 where none is known."""
    assert sample.depth is not None
    sizes = [(frame.shape[1], frame.shape[0]) for frame in sample.frames]
    pooled = []
    # Frames of one size have one grid and are pooled in one call; all frames of a sequence, as a rule.
    for (size, grid), run in groupby(zip(sizes, grids, sample.depth, strict=True), key=lambda one: one[:2]):
        maps = [depth for _, _, depth in run]
        pooled.append(pool_depth(maps, [size] * len(maps), grid.x_edges(), grid.y_edges()).ravel())
    return np.concatenate(pooled)


def _check(sample: Sample, index: int) -> None:
    count = len(sample.frames)
    for tracks in sample.tracks:
        if tracks.visible.shape[1] != count:
            raise ValueError(
                f"sample {index} has {count} frames and tracks through {tracks.visible.shape[1]}; "
                "pass the tracks of exactly these frames"
            )
    if sample.tracks and count < 2:
        raise ValueError(f"sample {index} has tracks through {count} frames; a match needs two")
    if sample.depth is not None and len(sample.depth) != count:
        raise ValueError(f"sample {index} has {count} frames and {len(sample.depth)} depth maps; one each is needed")


def _no_matches() -> Matches:
    none = torch.zeros(0)
    return Matches(
        frame_offsets=torch.zeros(2, dtype=torch.long),
        anchor=none.long(),
        target=none.long(),
        target_depth=none,
        patch_depth=none,
        token_xy=none.long().reshape(0, 2),
    )


def _tensor(values: NDArray[Any], dtype: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))

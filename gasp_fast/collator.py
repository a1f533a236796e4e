"""Collator: samples (frames, messages, tracks) become a batch of model inputs and the `Matches` of its visual tokens.

The frames go through the model's processor. `Backbone.frame_grid` describes how that processor resizes and crops, so
it maps the tracks from pixels of the frames to tokens. Points that a crop cuts off are dropped. A query point that two
grids share, as a grid of 24 x 24 has all points of one of 8 x 8, is supervised once.

A model may merge several frames into one grid of tokens (`Backbone.frames_per_grid`). To `Matches` such a grid is one
frame: a point that is seen in any of its frames lies in its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gasp_fast.backbones import Backbone, Conversation, TokenGrid
from gasp_fast.backbones.chat import Message
from gasp_fast.backbones.frames import RGBImage
from gasp_fast.config.limits import LARGEST_SEED, check_whole
from gasp_fast.data.depth.pooling import pool_depth
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import Tracks
from gasp_fast.data.tracks.reference import most_visible
from gasp_fast.loss.matches import Matches

Anchors = Literal["first", "all", "pairs"]
Unit = Literal["match", "anchor", "track"]


@dataclass(frozen=True, kw_only=True)
class CollatorConfig:
    """Selects the supervised matches among those that the tracks imply.

    A track seen in `n` frames implies `n (n - 1)` ordered matches. `anchors="first"` takes those that start in the
    query frame, the first but for `data.scenes.order`; "all" takes every one; "pairs" takes those of `pairs` ordered
    pairs of frames, drawn anew for each sample.
    """

    anchors: Anchors = "all"  # where matches start: first (the query frame), all frames, or drawn pairs of frames
    pairs: int = 32  # for anchors = pairs: ordered pairs of frames of each sequence
    keep: float = 1.0  # share of each grid's tracks to keep, those seen most often within the model's crop
    seed: int = 0  # of the drawn pairs, together with the sample's own position
    prompt: str = "Describe the scene."  # the user's message for frames that come without messages

    def __post_init__(self) -> None:
        if self.anchors not in get_args(Anchors):
            raise ValueError(f"anchors = {self.anchors!r} is unknown; choose one of {', '.join(get_args(Anchors))}")
        check_whole(self, ("pairs",))
        check_whole(self, ("seed",), least=0, most=LARGEST_SEED)
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep = {self.keep} is a share of the tracks; give 0 < keep <= 1")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence, independent of a model. Tracks give it geometric supervision, messages give it language."""

    frames: Sequence[RGBImage]
    messages: Sequence[Message] = ()
    tracks: Sequence[Tracks] = ()  # of these frames; several grids (coarse and fine) are supervised together
    depth: Sequence[NDArray[np.floating]] | None = None  # a map for each frame, at any resolution; 0 is unknown
    position: int = 0  # in the stream of samples: makes the drawn pairs reproducible


def geometry_sample(scene: Scene, tracks: Sequence[Tracks], position: int = 0) -> Sample:
    """The sample of one sequence of a scene. `tracks` has an entry for each grid, all over the same frames."""
    frames = [int(frame) for frame in tracks[0].frames]
    return Sample(
        frames=[scene.image(frame) for frame in frames],
        tracks=tracks,
        depth=[scene.depth(frame) for frame in frames] if scene.has_depth else None,
        position=position,
    )


class Collator:
    """Turns a list of samples into a dict with the model's inputs (labels included) and two more entries:

    - `visual_positions` int64 `[N]`: flat indices into `B * S` of the visual tokens of all sequences with tracks, in
      the order of the matches' token indices;
    - `matches`: the ground truth over those `N` tokens. A batch without tracks has `N = 0` and no match.

    `unit` is what has a weight of 1 in the means of the loss: a match; or an anchor token or a track, which the matches
    that it has share equally. Can be pickled for loader workers.
    """

    def __init__(self, backbone: Backbone, config: CollatorConfig | None = None, unit: Unit = "match") -> None:
        self.backbone = backbone
        self.config = CollatorConfig() if config is None else config
        self.unit = unit

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        for index, sample in enumerate(samples):
            _check(sample, index)
        prompt: list[Message] = [{"role": "user", "content": self.config.prompt}]
        encoded = self.backbone.encode([Conversation(s.frames, s.messages or prompt) for s in samples])
        tracked = [index for index, sample in enumerate(samples) if sample.tracks]
        matches = [self._matches(samples[index], encoded.grids[index]) for index in tracked]
        positions = [encoded.positions[index] for index in tracked]
        return {
            **encoded.inputs,
            "visual_positions": torch.cat(positions) if positions else torch.zeros(0, dtype=torch.long),
            "matches": Matches.pack(matches) if matches else no_matches(),
        }

    def matches(self, sample: Sample) -> Matches:
        """The matches of one sequence with tracks, over its own visual tokens."""
        _check(sample, 0)
        frames = sample.frames[:: self.backbone.frames_per_grid]
        return self._matches(sample, [self.backbone.frame_grid(frame.shape[1], frame.shape[0]) for frame in frames])

    def _matches(self, sample: Sample, grids: Sequence[TokenGrid]) -> Matches:
        """The matches of one sequence, over its own visual tokens. `grids` has an entry for each token grid."""
        grid_offsets = np.concatenate([[0], np.cumsum([grid.tokens for grid in grids])])  # [G + 1]
        grid_of = np.arange(len(sample.frames)) // self.backbone.frames_per_grid  # [F]
        from_frame, to_frame = self._frame_pairs(grid_of, sample.tracks[0].query_frame, sample.position)  # [P], [P]
        frame_grids, starts = [grids[int(g)] for g in grid_of], grid_offsets[grid_of]  # of each frame
        patch_depth = None if sample.depth is None else _patch_depth(sample, frame_grids, grid_of)
        anchor, target, depth, track = [], [], [], []
        first = 0  # number of a grid's first track
        for tokens, depths in self._supervised_tracks(sample.tracks, frame_grids, starts):  # [T, F]
            from_token, to_token = tokens[:, from_frame], tokens[:, to_frame]  # [T, P]
            matched = (from_token >= 0) & (to_token >= 0)
            anchor.append(from_token[matched])
            target.append(to_token[matched])
            depth.append(depths[:, to_frame][matched])
            track.append(first + np.nonzero(matched)[0])
            first += len(tokens)
        shared_by = {"match": None, "anchor": anchor, "track": track}[self.unit]
        return Matches(
            frame_offsets=_tensor(grid_offsets, np.int64),
            anchor=_tensor(np.concatenate(anchor), np.int64),
            target=_tensor(np.concatenate(target), np.int64),
            target_depth=_tensor(np.concatenate(depth), np.float32),
            patch_depth=None if patch_depth is None else _tensor(patch_depth, np.float32),
            token_xy=_tensor(np.concatenate([grid.xy() for grid in grids]), np.int64),
            weight=None if shared_by is None else _tensor(_equal_shares(np.concatenate(shared_by)), np.float32),
        )

    def _supervised_tracks(
        self, by_grid: Sequence[Tracks], grids: Sequence[TokenGrid], starts: NDArray[np.integer]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.floating]]]:
        """Tokens and depths `[T, F]` of each grid's tracks: the share `keep` of them, without points seen before."""
        points = np.zeros(0, np.int64)
        for tracks in by_grid:
            tokens, own = track_tokens(tracks, grids, starts), _point_numbers(tracks)
            chosen = np.sort(most_visible((tokens >= 0).T, self.config.keep))
            chosen = chosen[~np.isin(own[chosen], points)]
            points = np.concatenate([points, own[chosen]])
            yield tokens[chosen], tracks.depth[chosen]

    def _frame_pairs(
        self, grid_of: NDArray[np.integer], query: int, position: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ordered pairs of frames that are supervised, as (anchor frames, target frames).

        Two frames that share a grid `grid_of [F]` are no pair: their points lie among the same tokens.
        """
        from_frame, to_frame = np.nonzero(grid_of[:, None] != grid_of)
        if self.config.anchors == "first":
            return from_frame[from_frame == query], to_frame[from_frame == query]
        if self.config.anchors == "pairs" and self.config.pairs < len(from_frame):
            rng = np.random.default_rng([self.config.seed, position])
            chosen = np.sort(rng.choice(len(from_frame), self.config.pairs, replace=False))
            from_frame, to_frame = from_frame[chosen], to_frame[chosen]
        return from_frame, to_frame


def track_tokens(tracks: Tracks, grids: Sequence[TokenGrid], starts: NDArray[np.integer]) -> NDArray[np.int64]:
    """The token of each tracked point in each frame, `[T, F]`; -1 where the point is not visible or has no token.

    `grids` and `starts` `[F]` are each frame's grid and the number of its first token.
    """
    tokens = np.stack([grid.locate(tracks.uv[:, f]) for f, grid in enumerate(grids)], axis=1)
    return np.where(tracks.visible & (tokens >= 0), tokens + starts, -1)


def _point_numbers(tracks: Tracks) -> NDArray[np.int64]:
    """A number for each query point, `[T]`: equal for equal points.

    Equal to 1/1024 pixel, because annotations are float32 and the centres of two grids' cells differ by rounding. No
    centre lies half way between two such units: `1024 (2 i + 1) width / (2 g)` is no odd half for g < 1024.
    """
    x, y = np.rint(tracks.query * 1024).astype(np.int64).T
    return (x << 32) | y


def _equal_shares(unit: NDArray[np.integer]) -> NDArray[np.float64]:
    """The weight of each match, `[M]`: 1 over the number of matches of the same unit."""
    _, number, matches = np.unique(unit, return_inverse=True, return_counts=True)
    return 1 / matches[number]


def _patch_depth(sample: Sample, grids: Sequence[TokenGrid], grid_of: NDArray[np.integer]) -> NDArray[np.float32]:
    """Mean known depth of every token's patch, `[N]`; 0 where none is known. `grids` are those of the frames.

    Where frames share a grid (`grid_of [F]`), the mean over those of them that know a depth there.
    """
    assert sample.depth is not None
    sizes = [(frame.shape[1], frame.shape[0]) for frame in sample.frames]
    pooled: list[NDArray[np.float32]] = []  # of each frame, [tokens]
    # Consecutive frames of one size have the same grid and are pooled in one call: usually the whole sequence.
    for (size, grid), run in groupby(zip(sizes, grids, sample.depth, strict=True), key=lambda frame: frame[:2]):
        maps = [depth for _, _, depth in run]
        pooled += list(pool_depth(maps, [size] * len(maps), grid.x_edges(), grid.y_edges()).reshape(len(maps), -1))
    return np.concatenate([_mean_known(pooled, np.flatnonzero(grid_of == g)) for g in np.unique(grid_of)])


def _mean_known(depths: Sequence[NDArray[np.float32]], frames: NDArray[np.integer]) -> NDArray[np.float32]:
    if len(frames) == 1:
        return depths[int(frames[0])]
    shared = np.stack([depths[int(frame)] for frame in frames])  # [frames, tokens]
    return (shared.sum(0, dtype=np.float64) / np.maximum((shared > 0).sum(0), 1)).astype(np.float32)


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


def no_matches() -> Matches:
    """Matches over no token."""
    empty = torch.zeros(0)
    return Matches(
        frame_offsets=torch.zeros(2, dtype=torch.long),
        anchor=empty.long(),
        target=empty.long(),
        target_depth=empty,
        patch_depth=empty,
        token_xy=empty.long().reshape(0, 2),
    )


def _tensor(values: NDArray[Any], dtype: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))

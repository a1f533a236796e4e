"""What `Gasp.matches` is given: frames, and point tracks from anywhere. Mistakes are errors that say what to pass.

Frames count for their size only. The model gets them from the user's own processor.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gasp_fast.collator import Sample
from gasp_fast.data.tracks.build import Tracks
from gasp_fast.loss.matches import Matches

CHANNELS = (1, 2, 3, 4)  # of grey and colour images, without and with alpha


def tracked_sample(
    images: Sequence[Any],
    uv: ArrayLike,
    visible: ArrayLike,
    depth: ArrayLike | None,
    depth_maps: Sequence[ArrayLike] | None,
    query_frame: int,
) -> Sample:
    """The arguments of `Gasp.matches` as one sample."""
    frames = [_frame(number, image) for number, image in enumerate(images)]
    points, seen = np.asarray(uv, dtype=np.float64), np.asarray(visible, dtype=bool)
    _check_tracks(frames, points, seen)
    maps = None if depth_maps is None else _maps(depth_maps, len(frames))
    if depth is None:
        depths = np.zeros(seen.shape) if maps is None else _depth_at(maps, frames, points, seen)
    else:
        depths = np.asarray(depth, dtype=np.float64)
        if depths.shape != seen.shape:
            raise ValueError(f"depth {list(depths.shape)} must be {list(seen.shape)}, like visible")
        if maps is None:
            raise ValueError(
                "depth is given, and depth_maps = None: the depth loss compares the depth of points with that of "
                "tokens, which it takes from the maps; pass depth_maps=[...], one [h, w] for each image, or leave "
                "depth out"
            )
    if not 0 <= query_frame < len(frames):
        raise ValueError(f"query_frame = {query_frame} is none of the {len(frames)} images, 0 to {len(frames) - 1}")
    query = np.nan_to_num(points[:, query_frame])
    tracks = Tracks(np.arange(len(frames)), query, points, seen, depths, query_frame)
    return Sample(frames=frames, tracks=[tracks], depth=maps)


def warn_without_matches(matches: Matches, sample: Sample) -> None:
    """Warn if no match results from tracks. None from no tracks at all is no surprise."""
    [tracks] = sample.tracks
    count = len(tracks.visible)
    if len(matches) or not count:
        return
    often = int((tracks.visible.sum(1) >= 2).sum())
    sizes = np.array([frame.shape[1::-1] for frame in sample.frames])  # [F, 2], width and height
    with np.errstate(invalid="ignore"):
        inside = ((tracks.uv >= 0) & (tracks.uv < sizes)).all(-1) & tracks.visible
    warnings.warn(
        f"gasp.matches: no match, so these frames teach the model no geometry. Of {count} points, {often} are visible "
        f"in two images or more, and {int((inside.sum(1) >= 2).sum())} of these lie inside two. Check that visible is "
        "true where a point is seen, and that uv are x, y in pixels of these images",
        stacklevel=3,
    )


def _frame(number: int, image: Any) -> NDArray[Any]:
    """The image as [H, W] or [H, W, channels]; one with its channels first, as processors take too, is turned."""
    frame = np.asarray(image)
    if frame.ndim == 3 and frame.shape[2] not in CHANNELS and frame.shape[0] in CHANNELS:
        frame = np.moveaxis(frame, 0, -1)
    if frame.ndim not in (2, 3) or (frame.ndim == 3 and frame.shape[2] not in CHANNELS):
        raise ValueError(
            f"images[{number}] has the shape {list(frame.shape)}; pass a list of frames, each an array [H, W, 3] or "
            "a PIL image"
        )
    return frame


def _check_tracks(frames: Sequence[NDArray[Any]], uv: NDArray[np.float64], visible: NDArray[np.bool_]) -> None:
    count = len(frames)
    if uv.ndim != 3 or uv.shape[1:] != (count, 2) or visible.shape != uv.shape[:2]:
        turned = uv.ndim == 3 and uv.shape[0] == count and uv.shape[2] == 2
        cure = "; turn [images, tracks, 2] with uv.transpose(1, 0, 2) and visible.T" if turned else ""
        raise ValueError(
            f"uv {list(uv.shape)} and visible {list(visible.shape)} do not fit {count} images; they are "
            f"[tracks, images, 2] and [tracks, images]{cure}"
        )
    shown = uv[visible & np.isfinite(uv).all(-1)]
    height, width = np.min([frame.shape[:2] for frame in frames], axis=0) if frames else (0, 0)
    if len(shown) and shown.min() >= 0 and shown.max() <= 1 and min(height, width) > 2:
        raise ValueError(
            f"uv: all visible points lie within 0 to 1, as fractions of a frame, and the images have {width}x{height} "
            f"pixels; give pixels: multiply x by {width} and y by {height}"
        )


def _maps(depth_maps: Sequence[ArrayLike], count: int) -> list[NDArray[np.float32]]:
    maps = [np.asarray(one, dtype=np.float32) for one in depth_maps]
    if len(maps) != count:
        raise ValueError(
            f"depth_maps: {len(maps)} depth maps for {count} images; pass one for each, with 0 where depth is unknown"
        )
    for number, map_ in enumerate(maps):
        if map_.ndim != 2:
            cure = "; drop its axis of length 1: depth_map.squeeze()" if map_.squeeze().ndim == 2 else ""
            raise ValueError(f"depth_maps[{number}] has the shape {list(map_.shape)}; a depth map is [h, w]{cure}")
    return maps


def _depth_at(
    maps: Sequence[NDArray[np.float32]],
    frames: Sequence[NDArray[Any]],
    uv: NDArray[np.float64],
    visible: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """The depth that each map has at each visible point, [T, F]; 0 elsewhere."""
    depth = np.zeros(visible.shape)
    for number, (map_, frame) in enumerate(zip(maps, frames, strict=True)):
        seen = visible[:, number]
        scale = np.array([map_.shape[1] / frame.shape[1], map_.shape[0] / frame.shape[0]])
        column, row = np.floor(uv[seen, number] * scale).astype(int).T
        inside = (column >= 0) & (column < map_.shape[1]) & (row >= 0) & (row < map_.shape[0])
        depth[np.flatnonzero(seen)[inside], number] = map_[row[inside], column[inside]]
    return depth

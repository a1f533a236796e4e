"""Draws the tracks of a scene over its frames, so that a wrong geometry is visible at a glance.

The first panel is the query frame; the others are later frames at growing distances. Each shows the points at their
projections: filled if visible, hollow if hidden, coloured by their depth in the query frame. Sixteen well-spread points
have numbers: in a sound scene a number marks the same thing in every frame. Below each frame is its depth map.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import Tracks, build_tracks
from gasp_fast.drawing import DEPTH_COLOURS, depth_norm, draw_depth, draw_depth_bar, panels

PANELS = 5
# Distances of the panels' frames from the query frame; in a shorter scene the frames are spread evenly.
STEPS = (0, 1, 5, 10, 20)
GRID = 12
NUMBERED = 16


def draw_tracks(scene: Scene, path: Path, first: int = 0, grid: int = GRID) -> Path:
    """Writes the picture to `path` (PNG)."""
    if not scene.has_depth:
        raise ValueError(f"{scene.root}: no depth, so no tracks to draw; make it with: gasp-fast depth {scene.root}")
    frames = _chosen_frames(len(scene), first)
    tracks = build_tracks(scene, frames, grid=grid, keep=1.0)

    maps = [scene.depth(i) for i in frames]
    norm = depth_norm(np.concatenate([one[one > 0] for one in maps]))
    numbers = _spread(tracks, NUMBERED)

    width, height = scene.image_size(frames[0])
    figure, axes, bar_axis = panels(2, len(frames), height / width)
    for f, index in enumerate(frames):
        top, bottom = axes[0, f], axes[1, f]
        wide, tall = scene.image_size(index)
        image = scene.image(index)
        # Paler and greyer, so that the points stand out.
        faded = 0.35 * image + 0.35 * image.mean(axis=2, keepdims=True) + 0.3 * 255
        top.imshow(faded.astype(np.uint8), extent=(0, wide, tall, 0))
        _draw_points(top, tracks, f, numbers, norm)
        shown = tracks.visible[:, f].mean() if len(tracks) else 0.0
        step = "query frame" if f == 0 else f"{index - frames[0]} frames later, {shown:.0%} of points visible"
        top.set_title(f"{scene.frame_names[index]}\n{step}", fontsize=10, parse_math=False)
        mesh = draw_depth(bottom, maps[f], norm, (wide, tall))
        for axis in (top, bottom):
            axis.set(xlim=(0, wide), ylim=(tall, 0), xticks=[], yticks=[])
    draw_depth_bar(figure, mesh, bar_axis, "depth (scene's unit)")
    title = f"{scene.root.name}: filled = visible, hollow = hidden; a number must mark the same thing in every frame"
    if not len(tracks):
        title = f"{scene.root.name}: NO point of the query frame is visible again: poses, intrinsics or depth are wrong"
    figure.suptitle(title, fontsize=11, y=0.985, parse_math=False)
    figure.savefig(path)
    return path


def _chosen_frames(count: int, first: int) -> list[int]:
    """The query frame `first` and the frames of the other panels."""
    if not 0 <= first < count:
        raise ValueError(f"first = {first}; the scene has frames 0 to {count - 1}")
    steps = STEPS
    if first + STEPS[-1] >= count:
        steps = tuple(dict.fromkeys(np.linspace(0, count - 1 - first, PANELS).round().astype(int).tolist()))
    return [first + step for step in steps]


def _spread(tracks: Tracks, count: int) -> np.ndarray:
    """Indices of `count` tracks far from each other in the query frame (farthest-point sampling)."""
    if not len(tracks):
        return np.zeros(0, int)
    chosen = [0]
    distance = np.linalg.norm(tracks.query - tracks.query[0], axis=1)
    while len(chosen) < min(count, len(tracks)):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(tracks.query - tracks.query[chosen[-1]], axis=1))
    # Numbered from the top left, in reading order.
    return np.array(sorted(chosen, key=lambda k: (tracks.query[k, 1], tracks.query[k, 0])))


def _draw_points(axis: Any, tracks: Tracks, f: int, numbers: np.ndarray, norm: Any) -> None:
    """The points of frame `f`; the tracks in `numbers` with their number."""
    from matplotlib import colormaps
    from matplotlib.patheffects import withStroke

    colours = colormaps[DEPTH_COLOURS](norm(tracks.depth[:, 0]))
    size = np.array([axis.get_xlim()[1], axis.get_ylim()[0]])
    inside = ((tracks.uv[:, f] >= 0) & (tracks.uv[:, f] < size)).all(axis=1) & (tracks.depth[:, f] > 0)
    seen = tracks.visible[:, f]
    hidden = inside & ~seen
    axis.scatter(*tracks.uv[hidden, f].T, s=16, facecolors="none", edgecolors=colours[hidden], linewidths=1.1)
    axis.scatter(*tracks.uv[seen, f].T, s=26, c=colours[seen], edgecolors="black", linewidths=0.6)
    for number, k in enumerate(numbers, start=1):
        if not seen[k]:
            continue
        # Above and to the right of its point, unless that is outside the panel.
        near_right, near_top = tracks.uv[k, f, 0] > 0.92 * size[0], tracks.uv[k, f, 1] < 0.1 * size[1]
        axis.annotate(
            str(number),
            tracks.uv[k, f],
            xytext=(-4 if near_right else 4, -4 if near_top else 3),
            textcoords="offset points",
            ha="right" if near_right else "left",
            va="top" if near_top else "bottom",
            fontsize=8,
            fontweight="bold",
            path_effects=[withStroke(linewidth=2.2, foreground="white")],
        )

"""Pictures of predicted geometry beside the true one: depth maps, and cameras from above. NumPy arrays; no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gasp_fast.drawing import COLOURS, GREY, depth_norm, draw_depth, draw_depth_bar, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 5  # frames of a picture of depth
FRUSTUM = 0.12  # depth of a drawn camera, in sizes of the picture


def draw_depths(
    images: ArrayLike,  # uint8 [F, H, W, 3]
    predicted: ArrayLike,  # [F, H, W], depth in the unit of the truth
    true: ArrayLike,  # [F, H, W]
    valid: ArrayLike,  # bool [F, H, W], where the truth is known
    title: str = "",
) -> Figure:
    """Frames, their true depth, predicted depth in the same colours, and relative error. Grey: not known."""
    colours, ours, truth = np.asarray(images), np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    truth = np.where(np.asarray(valid, bool), truth, 0)
    frames = np.unique(np.linspace(0, len(truth) - 1, min(COLUMNS, len(truth))).round().astype(int))
    error = np.abs(ours - truth) / np.where(truth > 0, truth, np.inf)
    norm = depth_norm(truth[truth > 0])
    figure, axes, bar_axis = panels(4, len(frames), truth.shape[1] / truth.shape[2])
    for column, frame in enumerate(frames):
        image, of_truth, of_ours, of_error = axes[:, column]
        image.imshow(colours[frame])
        mesh = draw_depth(of_truth, truth[frame], norm)
        draw_depth(of_ours, ours[frame], norm)
        _draw_error(of_error, error[frame], truth[frame] > 0)
        image.set_title(f"frame {frame}", fontsize=10)
        for axis in axes[:, column]:
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ("image", "true depth", "predicted depth", ""), strict=True):
        _name(axis, name)
    draw_depth_bar(figure, mesh, bar_axis, "depth (unit of the truth)")
    figure.suptitle(title, fontsize=11, y=0.985, parse_math=False)
    return figure


def draw_predicted_depths(
    images: ArrayLike,  # uint8 [F, H, W, 3]
    predicted: ArrayLike,  # [F, H, W]
    all_depths: ArrayLike,  # that decide the colours
    first: int = 0,  # number of the first image
) -> Figure:
    """Photographs and their predicted depth, which has no unit."""
    colours, depth, every = np.asarray(images), np.asarray(predicted, np.float64), np.asarray(all_depths, np.float64)
    norm = depth_norm(every[every > 0])
    figure, axes, bar_axis = panels(2, len(depth), depth.shape[1] / depth.shape[2])
    for column, (image, of_depth) in enumerate(axes.T):
        image.imshow(colours[column])
        mesh = draw_depth(of_depth, depth[column], norm)
        image.set_title(f"image {first + column}", fontsize=10)
        for axis in (image, of_depth):
            axis.set(xticks=[], yticks=[])
    draw_depth_bar(figure, mesh, bar_axis, "depth (no unit)")
    return figure


def _draw_error(axis: Any, error: NDArray[np.float64], known: NDArray[np.bool_]) -> None:
    axis.set_facecolor("0.85")
    masked = np.ma.masked_array(error, ~known)
    axis.imshow(masked, cmap="magma", vmin=0, vmax=0.25, interpolation="nearest")
    mean = f", mean {error[known].mean():.3f}" if known.any() else ""
    _name(axis, f"relative error, 0 (black) to 0.25{mean}")


def _name(axis: Any, words: str) -> None:
    if words:
        box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 2.5}
        axis.text(0.02, 0.97, words, transform=axis.transAxes, va="top", fontsize=9, bbox=box)


def draw_cameras(
    rotation: ArrayLike,  # [F, 3, 3], predicted, camera to the camera of frame 0
    translation: ArrayLike,  # [F, 3], in the unit of the truth
    true_rotation: ArrayLike,
    true_translation: ArrayLike,
    title: str = "",
) -> Figure:
    """Cameras from above, x to the right and z, the direction in which frame 0 looks, upwards."""
    from matplotlib.figure import Figure

    ours = np.asarray(rotation, np.float64), np.asarray(translation, np.float64)
    truth = np.asarray(true_rotation, np.float64), np.asarray(true_translation, np.float64)
    places = np.concatenate([ours[1], truth[1]])[:, [0, 2]]
    size = max(float(np.ptp(places, axis=0).max()), 1e-6)
    figure = Figure(figsize=(6.4, 6.4), dpi=130, layout="constrained")
    axis = figure.subplots()
    for start, end in zip(truth[1], ours[1], strict=True):
        axis.plot([start[0], end[0]], [start[2], end[2]], color=GREY, linewidth=0.9, linestyle=":")
    _draw_path(axis, *truth, FRUSTUM * size, COLOURS[-1], "true")
    _draw_path(axis, *ours, FRUSTUM * size, COLOURS[1], "predicted, in the unit of the truth")
    axis.set_aspect("equal", adjustable="datalim")  # the square is filled
    axis.set(xlabel="x", ylabel="z")
    axis.margins(0.08)
    axis.grid(True, color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    figure.suptitle(title or "Cameras from above, in the camera of frame 0", fontsize=11, parse_math=False)
    return figure


def _draw_path(
    axis: Any, rotation: NDArray[np.float64], place: NDArray[np.float64], size: float, colour: str, label: str
) -> None:
    """The way of the cameras, and a triangle for each: its tip is the camera, its open side where it looks."""
    axis.plot(place[:, 0], place[:, 2], color=colour, linewidth=1.0, alpha=0.6)
    corners = size * np.array([[0.0, 0, 0], [-0.5, 0, 1], [0.5, 0, 1], [0.0, 0, 0]])
    for number, (turn, at) in enumerate(zip(rotation, place, strict=True)):
        outline = corners @ turn.T + at  # [4, 3]
        axis.fill(outline[:, 0], outline[:, 2], color=colour, alpha=0.12)
        axis.plot(outline[:, 0], outline[:, 2], color=colour, linewidth=1.5, label=label if number == 0 else None)
        axis.annotate(str(number), at[[0, 2]], xytext=(0, -9), textcoords="offset points", color=colour, fontsize=8)

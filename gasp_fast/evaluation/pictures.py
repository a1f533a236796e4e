"""Draws the predictions of one sequence on its frames.

*Predictions*: the query points on the anchor frame, and in each later frame where the layer predicts them; the bottom
row shows the true positions. A point has the same colour in all panels, by its true displacement. Correct
predictions are dots, wrong ones crosses. A later frame shows only the points that are visible in it.

*Heat map*: one query point, and its matching probabilities over later frames; a ring marks the true position. All
panels share one colour scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gasp_fast.backbones import TokenGrid

PANELS = 4  # later frames that are drawn
CORRECT_EDGE, WRONG_EDGE = "#ffffff", "#000000"  # around dots, behind crosses; the colour inside is the displacement
DISPLACEMENTS = "viridis"  # monotonic in brightness, and safe for colour-blind readers
PROBABILITIES = "YlOrRd"  # likewise, and unlike the colours of a grey photograph


@dataclass(frozen=True)
class DrawnSequence:
    """The frames of a sequence and the predictions of one layer. Tokens count over all frames of the sequence."""

    frames: Sequence[NDArray[np.uint8]]  # F times [H, W, 3]
    numbers: Sequence[int]  # frame numbers in the scene
    grids: Sequence[TokenGrid]
    anchor: NDArray[np.integer]  # [M]
    target: NDArray[np.integer]  # [M]
    best: NDArray[np.integer]  # [M], predicted token
    correct: NDArray[np.bool_]  # [M]
    radius: float  # patches, within which a prediction is correct

    def frame_of(self, token: NDArray[np.integer]) -> NDArray[np.integer]:
        """Index of the frame that a token belongs to."""
        return np.searchsorted(np.cumsum([grid.tokens for grid in self.grids]), token, side="right")

    def pixel(self, token: NDArray[np.integer]) -> NDArray[np.float64]:
        """Pixel position `[..., 2]` of a token's centre."""
        return np.concatenate([grid.centres() for grid in self.grids])[token]

    def displacement(self) -> dict[int, float]:
        """Largest true displacement of each query point (by its token), relative to the image width."""
        distance = np.linalg.norm(self.pixel(self.target) - self.pixel(self.anchor), axis=-1)
        return {int(a): float(distance[self.anchor == a].max()) / self.frames[0].shape[1] for a in set(self.anchor)}

    def shown_frames(self) -> list[int]:
        """Indices of the later frames to draw, spread evenly over those with visible points."""
        seen = sorted(set(self.frame_of(self.target).tolist()))
        return [seen[k] for k in np.linspace(0, len(seen) - 1, min(PANELS, len(seen))).round().astype(int)]

    def gap(self, frame: int) -> str:
        gap = self.numbers[frame] - self.numbers[0]
        return f"{gap} frame{'s' * (gap > 1)} later"


def draw_predictions(sequences: Mapping[str, DrawnSequence], title: str, path: Path) -> Path:
    """One row of predictions for each model, all on the same sequence; last row: true positions.

    Models may have other token grids, and, where they crop, other points.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    first = next(iter(sequences.values()))
    displacement = first.displacement()
    norm = Normalize(0, max(0.05, max(displacement.values())))
    shown = first.shown_frames()
    figure, axes, bar = _layout(first, len(shown), rows=len(sequences) + 1)
    truth = replace(first, best=first.target, correct=np.ones_like(first.correct))
    for row, (label, sequence) in zip(axes, [*sequences.items(), ("true", truth)], strict=True):
        displacement = sequence.displacement()
        _show(row[0], first.frames[0])
        _dots(row[0], sequence.pixel(np.array(list(displacement))), list(displacement.values()), norm)
        row[0].set_ylabel(label, fontsize=11)
        for axis, frame in zip(row[1:], shown, strict=True):
            share = _draw_frame(axis, sequence, frame, displacement, norm)
            if sequence is not truth:
                gap = f"{sequence.gap(frame)}: " if row is axes[0] else ""
                axis.set_title(f"{gap}no point" if share is None else f"{gap}{share:.0%} correct", fontsize=10)
    axes[0][0].set_title(f"query points in frame {first.numbers[0]}", fontsize=10)
    colours = figure.colorbar(ScalarMappable(norm, DISPLACEMENTS), cax=bar)
    colours.set_label("true displacement (share of image width)", fontsize=9)
    _set_title(
        figure,
        f"{title}\ndots: within {first.radius:g} patches of the true position; crosses: wrong, with a line to it",
    )
    figure.savefig(path)
    return path


def _draw_frame(
    axis: Any, sequence: DrawnSequence, frame: int, displacement: Mapping[int, float], norm: Any
) -> float | None:
    """Predictions in one frame; returns the share of correct ones, None without points."""
    here = sequence.frame_of(sequence.target) == frame
    _show(axis, sequence.frames[frame])
    if not here.any():
        return None
    pixel, correct = sequence.pixel(sequence.best[here]), sequence.correct[here]
    colour = np.array([displacement[int(a)] for a in sequence.anchor[here]])
    wrong, truth = pixel[~correct], sequence.pixel(sequence.target[here])[~correct]
    axis.plot(*np.stack([wrong, truth]).transpose(2, 0, 1), color="black", linewidth=0.7, alpha=0.45)
    axis.scatter(*wrong.T, c=WRONG_EDGE, marker="x", s=34, linewidths=3.2)
    axis.scatter(*wrong.T, c=colour[~correct], cmap=DISPLACEMENTS, norm=norm, marker="x", s=34, linewidths=1.6)
    _dots(axis, pixel[correct], colour[correct], norm)
    return float(correct.mean())


def draw_heat_map(
    sequence: DrawnSequence, maps: Sequence[NDArray[np.floating]], query: int, title: str, path: Path
) -> Path:
    """`maps` `[F][rows, columns]`: matching probabilities of query token `query` over every frame."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    targets = sequence.target[sequence.anchor == query]
    true_token = dict(zip(sequence.frame_of(targets).tolist(), targets.tolist(), strict=True))  # by frame
    shown = [frame for frame in sequence.shown_frames() if frame in true_token]
    figure, axes, bar = _layout(sequence, len(shown), rows=1)
    highest = max(float(maps[frame].max()) for frame in shown)
    norm = LogNorm(highest / 100, highest)
    _show(axes[0][0], sequence.frames[0])
    _ring(axes[0][0], sequence.pixel(np.array(query)))
    axes[0][0].set_title(f"query point in frame {sequence.numbers[0]}", fontsize=10)
    for axis, frame in zip(axes[0][1:], shown, strict=True):
        grid = sequence.grids[frame]
        grey = sequence.frames[frame].mean(axis=2, keepdims=True)
        _show(axis, np.repeat(grey, 3, axis=2).astype(np.uint8))
        axis.imshow(
            maps[frame],
            extent=(grid.left, grid.right, grid.bottom, grid.top),
            cmap=PROBABILITIES,
            norm=norm,
            alpha=np.clip(0.95 * norm(maps[frame]).filled(0), 0, 0.85),  # transparent where the probability is low
            interpolation="nearest",
        )
        height, width = sequence.frames[frame].shape[:2]
        axis.set(xlim=(0, width), ylim=(height, 0))
        _ring(axis, sequence.pixel(np.array(true_token[frame])))
        axis.set_title(sequence.gap(frame), fontsize=10)
    colours = figure.colorbar(ScalarMappable(norm, PROBABILITIES), cax=bar)
    colours.set_label("matching probability", fontsize=9)
    _set_title(figure, f"{title}\nmatching probability of one query point; rings: true position")
    figure.savefig(path)
    return path


# ---- layout and marks -----------------------------------------------------------------------------------------------


def _layout(sequence: DrawnSequence, columns: int, rows: int) -> tuple[Any, Any, Any]:
    """A figure, its panels and an axis for the colour bar.

    Placed in inches, so that photographs keep their aspect ratio and nothing overlaps.
    """
    from matplotlib.figure import Figure

    height, width = sequence.frames[0].shape[:2]
    panel, gap, left, top, bottom, right = 2.7, 0.1, 0.4, 0.78, 0.12, 0.95
    row_gap = gap if rows < 3 else 0.3  # from three rows on, further rows have titles
    panel_height = panel * height / width
    count = columns + 1
    total = (left + count * panel + columns * gap + right, top + rows * panel_height + (rows - 1) * row_gap + bottom)
    figure = Figure(figsize=total, dpi=120)

    def box(x: float, y: float, wide: float, high: float) -> Any:  # inches from the top left
        return figure.add_axes((x / total[0], 1 - (y + high) / total[1], wide / total[0], high / total[1]))

    axes = [
        [box(left + c * (panel + gap), top + r * (panel_height + row_gap), panel, panel_height) for c in range(count)]
        for r in range(rows)
    ]
    bar = box(left + count * (panel + gap), top, 0.14, rows * panel_height + (rows - 1) * row_gap)
    return figure, axes, bar


def _set_title(figure: Any, text: str) -> None:
    figure.suptitle(text, fontsize=11, y=1 - 0.08 / figure.get_figheight(), va="top")  # 0.08 inches below the edge


def _show(axis: Any, image: NDArray[np.uint8]) -> None:
    height, width = image.shape[:2]
    paler = (0.65 * image + 0.35 * 255).astype(np.uint8)  # brighter and with less contrast, so that marks are visible
    axis.imshow(paler, extent=(0, width, height, 0))
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


def _dots(axis: Any, pixel: NDArray[np.floating], colour: Any, norm: Any) -> None:
    axis.scatter(*pixel.T, c=colour, cmap=DISPLACEMENTS, norm=norm, s=42, edgecolors=CORRECT_EDGE, linewidths=1.0)


def _ring(axis: Any, pixel: NDArray[np.floating]) -> None:
    axis.scatter(*pixel, s=190, facecolors="none", edgecolors="white", linewidths=4.0)
    axis.scatter(*pixel, s=190, facecolors="none", edgecolors="#0072B2", linewidths=2.2)

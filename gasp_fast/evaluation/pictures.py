"""Pictures of what a layer sees on real photographs: where it finds each point again, and how it spreads one point.

*Correspondences*: the points of the first frame, then the same points where the layer finds them in later frames, with
the truth beside (below). A point's colour is the same in all panels and tells how far it truly moved on the whole;
right answers are dots, wrong ones crosses. Only points that are truly visible in a frame are shown in it.

*Heat map*: one point of the first frame, and for each later frame how the layer spreads its belief over it; a ring
marks the truth. All panels of a picture have one colour scale.

Knows frames, token grids and answers; knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gasp_fast.backbones import TokenGrid

PANELS = 4  # later frames that are shown
RIGHT, WRONG = "#ffffff", "#000000"  # edges of dots and crosses; the colour itself tells the displacement
MAP = "viridis"  # ordered in brightness, and safe for colour-blind eyes
HEAT = "YlOrRd"  # the same, and unlike anything in a grey photograph


@dataclass(frozen=True)
class Sight:
    """One sequence with the answers of one layer, as drawn."""

    title: str
    frames: Sequence[NDArray[np.uint8]]  # [F, H, W, 3]
    numbers: Sequence[int]  # of the frames in their scene
    grids: Sequence[TokenGrid]
    anchor: NDArray[np.integer]  # [M], tokens over all frames
    target: NDArray[np.integer]  # [M]
    best: NDArray[np.integer]  # [M]
    correct: NDArray[np.bool_]  # [M]

    def starts(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum([grid.tokens for grid in self.grids])])

    def frame_of(self, token: NDArray[np.integer]) -> NDArray[np.integer]:
        return np.searchsorted(self.starts()[1:], token, side="right")

    def place(self, token: NDArray[np.integer]) -> NDArray[np.float64]:
        """Pixel positions of tokens `[..., 2]`."""
        return np.concatenate([grid.centres() for grid in self.grids])[token]

    def displacement(self) -> dict[int, float]:
        """How far each anchor truly moved at most, in shares of the image's width."""
        distance = np.linalg.norm(self.place(self.target) - self.place(self.anchor), axis=-1)
        return {int(a): float(distance[self.anchor == a].max()) / self.frames[0].shape[1] for a in set(self.anchor)}

    def shown(self) -> list[int]:
        """The later frames that are drawn, spread evenly over those with points."""
        seen = sorted(set(self.frame_of(self.target).tolist()))
        return [seen[k] for k in np.linspace(0, len(seen) - 1, min(PANELS, len(seen))).round().astype(int)]


def draw_correspondences(sight: Sight, path: Path) -> Path:
    """Top row: what the layer answers. Bottom row: the truth."""
    return draw_answers({"what the model finds": sight}, sight.title, path)


def draw_answers(sights: Mapping[str, Sight], title: str, path: Path) -> Path:
    """A row of answers for each model, all about the same questions, and the truth below them."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    sight = next(iter(sights.values()))
    moved = sight.displacement()
    norm = Normalize(0, max(0.05, max(moved.values())))
    shown = sight.shown()
    figure, axes, bar = _laid_out(sight, len(shown), rows=len(sights) + 1)
    anchors = np.array(sorted(moved))
    truth = replace(sight, best=sight.target, correct=np.ones_like(sight.correct))
    for row, (label, answers) in zip(axes, [*sights.items(), ("the truth", truth)], strict=True):
        _show(row[0], sight.frames[0])
        _dots(row[0], sight.place(anchors), [moved[int(a)] for a in anchors], norm)
        row[0].set_ylabel(label, fontsize=11)
        for axis, frame in zip(row[1:], shown, strict=True):
            share = _draw_found(axis, answers, frame, moved, norm)
            if answers is not truth:
                gap = sight.numbers[frame] - sight.numbers[0]
                later = f"{gap} frame{'s' * (gap > 1)} later: " if row is axes[0] else ""
                axis.set_title(f"{later}{share:.0%} right", fontsize=10)
    axes[0][0].set_title(f"points of frame {sight.numbers[0]}", fontsize=10)
    colours = figure.colorbar(ScalarMappable(norm, MAP), cax=bar)
    colours.set_label("true displacement (share of image width)", fontsize=9)
    _head(figure, f"{title}\ndot: within 2 patches of the truth, cross: wrong, with a line to the truth")
    figure.savefig(path)
    return path


def _draw_found(axis: Any, sight: Sight, frame: int, moved: Mapping[int, float], norm: Any) -> float:
    """The answers in one frame; returns the share of them that is right."""
    here = sight.frame_of(sight.target) == frame
    place, right = sight.place(sight.best[here]), sight.correct[here]
    colour = np.array([moved[int(a)] for a in sight.anchor[here]])
    _show(axis, sight.frames[frame])
    _errors(axis, place[~right], sight.place(sight.target[here])[~right])
    _crosses(axis, place[~right], colour[~right], norm)
    _dots(axis, place[right], colour[right], norm)
    return float(right.mean())


def draw_heat_map(sight: Sight, maps: Sequence[NDArray[np.floating]], anchor: int, path: Path) -> Path:
    """`maps [F][rows, columns]`: the belief about token `anchor` (of the first frame) over every frame."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    mine = sight.anchor == anchor
    truth = dict(zip(sight.frame_of(sight.target[mine]).tolist(), sight.target[mine].tolist(), strict=True))
    shown = [f for f in sight.shown() if f in truth]
    figure, axes, bar = _laid_out(sight, len(shown), rows=1)
    top = max(float(maps[f].max()) for f in shown)
    norm = LogNorm(top / 100, top)
    first = axes[0][0]
    _show(first, sight.frames[0])
    _ring(first, sight.place(np.array(anchor)))
    first.set_title(f"the point in frame {sight.numbers[0]}", fontsize=10)
    for column, f in enumerate(shown, start=1):
        axis, grid = axes[0][column], sight.grids[f]
        _show(axis, _grey(sight.frames[f]))
        axis.imshow(
            maps[f],
            extent=(grid.left, grid.right, grid.bottom, grid.top),
            cmap=HEAT,
            norm=norm,
            alpha=np.clip(0.95 * norm(maps[f]).filled(0), 0, 0.85),  # where nothing is believed the photograph shows
            interpolation="nearest",
        )
        height, width = sight.frames[f].shape[:2]
        axis.set(xlim=(0, width), ylim=(height, 0))
        _ring(axis, sight.place(np.array(truth[f])))
        gap = sight.numbers[f] - sight.numbers[0]
        axis.set_title(f"{gap} frame{'s' * (gap > 1)} later", fontsize=10)
    colours = figure.colorbar(ScalarMappable(norm, HEAT), cax=bar)
    colours.set_label("matching probability", fontsize=9)
    _head(figure, f"{sight.title}\none point over later frames; the ring marks the truth")
    figure.savefig(path)
    return path


def _laid_out(sight: Sight, columns: int, rows: int) -> tuple[Any, Any, Any]:
    """Panels and a colour bar, placed in inches: the photographs keep their shape and nothing overlaps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = sight.frames[0].shape[:2]
    panel, gap, left, head, foot, right = 2.7, 0.1, 0.4, 0.78, 0.12, 0.95
    between = gap if rows < 3 else 0.3  # room for the titles of further rows
    tall = panel * height / width
    count = columns + 1
    total = (left + count * panel + columns * gap + right, head + rows * tall + (rows - 1) * between + foot)
    figure = Figure(figsize=total, dpi=120)
    FigureCanvasAgg(figure)

    def box(x: float, y: float, wide: float, high: float) -> Any:  # inches from the top left
        return figure.add_axes((x / total[0], 1 - (y + high) / total[1], wide / total[0], high / total[1]))

    axes = [
        [box(left + c * (panel + gap), head + r * (tall + between), panel, tall) for c in range(count)]
        for r in range(rows)
    ]
    bar = box(left + count * (panel + gap), head, 0.14, rows * tall + (rows - 1) * between)
    return figure, axes, bar


def _head(figure: Any, text: str) -> None:
    figure.suptitle(text, fontsize=11, y=1 - 0.08 / figure.get_figheight(), va="top")  # in inches, however tall it is


def _show(axis: Any, image: NDArray[np.uint8]) -> None:
    height, width = image.shape[:2]
    axis.imshow(_paler(image), extent=(0, width, height, 0))
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


def _paler(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """So that marks stand out."""
    return (0.65 * image + 0.35 * 255).astype(np.uint8)


def _grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)


def _dots(axis: Any, place: NDArray[np.floating], colour: Any, norm: Any) -> None:
    axis.scatter(*place.T, c=colour, cmap=MAP, norm=norm, s=42, edgecolors=RIGHT, linewidths=1.0)


def _crosses(axis: Any, place: NDArray[np.floating], colour: Any, norm: Any) -> None:
    axis.scatter(*place.T, c=WRONG, marker="x", s=34, linewidths=3.2)
    axis.scatter(*place.T, c=colour, cmap=MAP, norm=norm, marker="x", s=34, linewidths=1.6)


def _errors(axis: Any, place: NDArray[np.floating], truth: NDArray[np.floating]) -> None:
    """Thin lines from wrong answers to where the points are."""
    axis.plot(*np.stack([place, truth]).transpose(2, 0, 1), color="black", linewidth=0.7, alpha=0.45)


def _ring(axis: Any, place: NDArray[np.floating]) -> None:
    axis.scatter(*place, s=190, facecolors="none", edgecolors="white", linewidths=4.0)
    axis.scatter(*place, s=190, facecolors="none", edgecolors="#0072B2", linewidths=2.2)

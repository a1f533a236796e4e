"""Figures of a comparison: a heat map of changes, and PCK against the mean over benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gasp_fast.drawing import COLOURS, GREY

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_gap(names: Sequence[str], titles: Sequence[str], changes: Sequence[Mapping[str, float]]) -> Figure:
    """A row for each model, a column for each benchmark; blue is better than the base, orange worse."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    points = np.array([[100 * one.get(title, np.nan) for title in titles] for one in changes])  # [models, benchmarks]
    figure = Figure(figsize=(1.8 + 1.1 * len(titles), 1.8 + 0.5 * len(names)), dpi=130, layout="constrained")
    axes = figure.subplots()
    largest = max(1.0, float(np.nanmax(np.abs(points))))
    colours = LinearSegmentedColormap.from_list("change", [COLOURS[1], "white", COLOURS[0]])
    picture = axes.imshow(points, cmap=colours, vmin=-largest, vmax=largest, aspect="auto")
    axes.set_xticks(range(len(titles)), titles, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    for row, column in np.argwhere(np.isfinite(points)):
        value = points[row, column]
        colour = "white" if abs(value) > 0.6 * largest else "black"
        axes.text(column, row, f"{value:+.1f}", ha="center", va="center", color=colour)
    figure.colorbar(picture, label="points against the base")
    return figure


def draw_pareto(points: Mapping[str, tuple[float, float]], front: Sequence[str]) -> Figure:
    """PCK and mean of each model; those on the front are joined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.0), dpi=130, layout="constrained")
    axes = figure.subplots()
    for name, (pck, whole) in points.items():
        axes.plot(pck, 100 * whole, "o", color=COLOURS[0] if name in front else GREY)
        axes.annotate(name, (pck, 100 * whole), xytext=(6, 4), textcoords="offset points")
    line = sorted(points[name] for name in front)
    axes.plot([pck for pck, _ in line], [100 * whole for _, whole in line], color=COLOURS[0], linewidth=1.2, zorder=0)
    axes.set(xlabel="PCK of the best layer", ylabel="mean over benchmarks (%)", title="Pareto front in blue")
    axes.margins(0.15)
    return figure

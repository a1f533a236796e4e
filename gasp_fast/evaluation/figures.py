"""Figure of one model or several: PCK and confidence–accuracy correlation by layer, PCK by temporal gap.

PCK by gap is drawn twice, as it is and relative to gap 1 (the paper's Figure 3): a model that finds nothing has a flat
relative curve. Relative curves of models that at gap 1 find less than half of what predicting the same position finds
are therefore pale.

Curves are means over sequences; shades are their standard deviation. Models differ by colour and by marker, so the
figure can be read without colour; all models share the axes and the legend. Undefined values are None in a report and
become NaN, which matplotlib leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gasp_fast.drawing import COLOURS, GREY, MARKERS

from .tables import KIND_NAMES, pck_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = "same position (identity)"
UNDEFINED = "undefined:\nall correct, all wrong, or constant confidence"
DOTTED = (0, (1.2, 1.4))
PALE = 0.3  # opacity
Metrics = Mapping[str, Any]  # an entry of `by_features`


def draw_figure(reports: Mapping[str, Mapping[str, Any]], kind: str) -> Figure:
    """The features of `kind` of each report, named by its key in the legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 7.6), dpi=130, layout="constrained")
    (by_layer, rho), (by_gap, relative) = figure.subplots(2, 2)
    metrics = {name: report["by_features"][kind] for name, report in reports.items()}
    pck = pck_name(reports)
    for number, (name, one) in enumerate(metrics.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        style = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.8}
        label = f"{name} (by gap: layer {one['temporal']['layer']}, its best)"
        _line(by_layer, one["layers"], one["pck"]["per_layer"], one["pck"]["per_layer_std"], style, label)
        moved = np.array(one["pck_moved"]["per_layer"], dtype=float)
        by_layer.plot(one["layers"], moved, color=colour, linestyle=DOTTED, linewidth=1.8)
        _line(rho, one["layers"], one["rho"]["per_layer"], one["rho"]["per_layer_std"], style)
        _draw_gaps(by_gap, relative, one, style)
    _draw_baselines(by_layer, rho, by_gap, relative, list(metrics.values()))
    by_layer.set(title=f"{pck} by layer", xlabel="layer", ylabel=pck, ylim=(0, 1))
    rho.set(title="Confidence–accuracy correlation by layer", xlabel="layer", ylabel="Pearson correlation ρ")
    by_gap.set(title=f"{pck} by temporal gap", xlabel="gap (frames)", ylabel=pck, ylim=(0, 1))
    relative.set(title=f"The same, relative to {pck} at gap 1", xlabel="gap (frames)", ylabel="share of gap 1")
    _set_axes(by_layer, rho, by_gap, relative, list(metrics.values()))
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    figure.suptitle(_title(reports, kind), fontsize=12)
    return figure


def _title(reports: Mapping[str, Mapping[str, Any]], kind: str) -> str:
    counts = " / ".join(map(str, sorted({report["sequences"] for report in reports.values()})))
    text = f"{KIND_NAMES[kind]}, {counts} sequences"
    return f"{next(iter(reports))}: {text}" if len(reports) == 1 else text[0].upper() + text[1:]


def _draw_gaps(by_gap: Any, relative: Any, metrics: Metrics, style: Mapping[str, Any]) -> None:
    """PCK by gap of the best layer, as it is and relative to gap 1."""
    temporal = metrics["temporal"]
    _line(by_gap, temporal["gaps"], temporal["pck"], temporal["pck_std"], style)
    # Where the PCK at gap 1 is zero or undefined there is no relative PCK, and no curve.
    first, guess = temporal["pck"][0], temporal["identity"][0]
    deviation = np.array(temporal["pck_std"], dtype=float) / (first or np.nan)
    opacity = PALE if first is not None and guess is not None and first < guess / 2 else 1.0
    _line(relative, temporal["gaps"], temporal["normalized"], deviation, style, opacity=opacity)


def _draw_baselines(by_layer: Any, rho: Any, by_gap: Any, relative: Any, metrics: Sequence[Metrics]) -> None:
    """What PCK is without correspondence, once if it is the same for all; the legend's entry for moved points."""
    by_layer.plot([], [], color=GREY, linestyle=DOTTED, linewidth=1.8, label="dotted: moved points only")
    for name, style, values in (
        (BASELINE, "--", {one["identity"] for one in metrics}),
        ("best constant token", "-.", {one["pck"].get("constant") for one in metrics}),
        ("chance", (0, (5, 5)), {one["pck"].get("chance") for one in metrics}),
    ):
        for number, value in enumerate(sorted({round(value, 6) for value in values if value is not None})):
            label, width = name if number == 0 else None, 1.4 if name == BASELINE else 1.0
            by_layer.axhline(value, color=GREY, linestyle=style, linewidth=width, label=label, zorder=1)
    rho.axhline(0, color=GREY, linewidth=1.0, zorder=1)
    temporal = metrics[0]["temporal"]
    guess = np.array(temporal["identity"], dtype=float)
    by_gap.plot(temporal["gaps"], guess, color=GREY, linestyle="--", linewidth=1.4, zorder=1)
    if temporal["identity"][0]:
        relative.plot(temporal["gaps"], guess / guess[0], color=GREY, linestyle="--", linewidth=1.4, zorder=1)


def _set_axes(by_layer: Any, rho: Any, by_gap: Any, relative: Any, metrics: Sequence[Metrics]) -> None:
    """Limits that hold for all models, grids and ticks."""
    from matplotlib.ticker import MaxNLocator

    values = [value for one in metrics for value in one["rho"]["per_layer"] if value is not None]
    rho.set_ylim(min(-0.3, min(values, default=0.0) - 0.1), 1)
    shares = np.concatenate([np.array(one["temporal"]["normalized"], dtype=float) for one in metrics])
    highest = np.nanmax(shares) if np.isfinite(shares).any() else 1.0
    relative.set_ylim(0, 1.1 * max(1.0, float(highest)))  # with few sequences the curve can rise above 1
    for axis in (by_layer, rho, by_gap, relative):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(True, color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    layers = [layer for one in metrics for layer in one["layers"]]
    for axis in (by_layer, rho):
        axis.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    if not values:
        rho.text(0.5, 0.5, UNDEFINED, transform=rho.transAxes, ha="center")
    if any(line.get_alpha() == PALE for line in relative.lines):
        text = "pale: at gap 1 less than half of the same position"
        relative.text(0.02, 0.03, text, transform=relative.transAxes, fontsize=8.5, color=GREY)


def _line(
    axis: Any,
    x: Sequence[int],
    values: Sequence[Any],
    deviation: Any,
    style: Mapping[str, Any],
    label: str | None = None,
    opacity: float = 1.0,
) -> None:
    y, spread = np.array(values, dtype=float), np.array(deviation, dtype=float)
    axis.plot(x, y, label=label, alpha=opacity, **style)
    axis.fill_between(x, y - spread, y + spread, color=style["color"], alpha=0.15 * opacity, linewidth=0)

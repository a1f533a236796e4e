"""The paper's Figure 3 for one model or several: PCK, confidence–accuracy correlation and PCK by temporal gap.

Curves are means over sequences; shades are their standard deviation. Models differ by colour and by marker, so the
figure can be read without colour; all models share the axes. The PCK panel also shows the identity baseline and the
PCK of moved points. Undefined values are None in a report and become NaN, which matplotlib leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .tables import pck_name

# Colours of Okabe and Ito, which colour-blind readers can distinguish, without the yellow: too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#6b6b6b"
_KINDS = {"head": "correspondence head", "qk": "queries and keys", "hidden": "hidden states"}
KIND_NAMES = {  # of what is measured: features in the forward or the causal direction
    name: text
    for kind, words in _KINDS.items()
    for name, text in ((kind, words), (f"{kind}-causal", f"{words}, causal"))
}
BASELINE = "same position (identity)"
UNDEFINED = "undefined:\nall correct, all wrong, or constant confidence"
Metrics = Mapping[str, Any]  # an entry of `by_features`


def draw_figure(reports: Mapping[str, Mapping[str, Any]], kind: str, path: Path) -> None:
    """Draws the PNG of the features of `kind` of each report, named by its key in the legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.4), dpi=130, layout="constrained")
    axes = figure.subplots(1, 3)
    metrics = {name: report["by_features"][kind] for name, report in reports.items()}
    single, pck = len(metrics) == 1, pck_name(reports)
    for number, (name, one) in enumerate(metrics.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        style = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.8}
        _draw_pck(axes[0], one, style, "all points" if single else name, pck)
        _draw_rho(axes[1], one, style, name)
        label = f"layer {one['temporal']['layer']} (best)" if single else f"{name}, layer {one['temporal']['layer']}"
        if (first := one["temporal"]["pck"][0]) is not None:
            label += f", PCK {first:.2f} at gap 1"  # a relative curve does not show it
        _draw_temporal(axes[2], one, style, label, pck, with_mean=single)
    _draw_baselines(axes, list(metrics.values()))
    _set_axes(axes, list(metrics.values()))
    for axis in (axes[0], axes[2]) if single else axes:
        axis.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    figure.suptitle(_title(reports, kind), fontsize=12)
    figure.savefig(path, format="png")


def _title(reports: Mapping[str, Mapping[str, Any]], kind: str) -> str:
    counts = " / ".join(map(str, sorted({report["sequences"] for report in reports.values()})))
    text = f"{KIND_NAMES[kind]}, {counts} sequences"
    return f"{next(iter(reports))}: {text}" if len(reports) == 1 else text[0].upper() + text[1:]


def _draw_pck(axis: Any, metrics: Metrics, style: Mapping[str, Any], label: str, pck: str) -> None:
    layers = metrics["layers"]
    _line(axis, layers, metrics["pck"]["per_layer"], metrics["pck"]["per_layer_std"], style, label)
    moved = np.array(metrics["pck_moved"]["per_layer"], dtype=float)
    axis.plot(layers, moved, color=style["color"], linestyle=(0, (1.2, 1.4)), linewidth=1.8)
    axis.set(title=f"{pck} by layer", xlabel="layer", ylabel=pck)


def _draw_rho(axis: Any, metrics: Metrics, style: Mapping[str, Any], label: str) -> None:
    rho = metrics["rho"]
    _line(axis, metrics["layers"], rho["per_layer"], rho["per_layer_std"], style, label)
    axis.set(title="Confidence–accuracy correlation by layer", xlabel="layer", ylabel="Pearson correlation ρ")


def _draw_temporal(
    axis: Any, metrics: Metrics, style: Mapping[str, Any], label: str, pck: str, with_mean: bool
) -> None:
    temporal = metrics["temporal"]
    # Where the PCK at gap 1 is zero or undefined there is no relative PCK, and no curve.
    deviation = np.array(temporal["pck_std"], dtype=float) / (temporal["pck"][0] or np.nan)
    _line(axis, temporal["gaps"], temporal["normalized"], deviation, style, label)
    if with_mean:
        mean = np.array(temporal["mean_over_layers"]["normalized"], dtype=float)
        axis.plot(temporal["gaps"], mean, color=COLOURS[1], marker=MARKERS[1], markersize=3.5, label="mean over layers")
    axis.set(title=f"{pck} by temporal gap", xlabel="gap (frames)", ylabel=f"{pck} relative to gap 1")


def _draw_baselines(axes: Any, metrics: Sequence[Metrics]) -> None:
    """What PCK is without correspondence, once if it is the same for all; the legend's entry for moved points."""
    for name, style, values in (
        (BASELINE, "--", {one["identity"] for one in metrics}),
        ("best constant token", "-.", {one["pck"].get("constant") for one in metrics}),
        ("chance", (0, (5, 5)), {one["pck"].get("chance") for one in metrics}),
    ):
        for number, value in enumerate(sorted({round(value, 6) for value in values if value is not None})):
            label, width = name if number == 0 else None, 1.4 if name == BASELINE else 1.0
            axes[0].axhline(value, color=GREY, linestyle=style, linewidth=width, label=label, zorder=1)
    axes[0].plot([], [], color=GREY, linestyle=(0, (1.2, 1.4)), linewidth=1.8, label="moved points (dotted)")
    axes[1].axhline(0, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
    temporal = metrics[0]["temporal"]
    if temporal["identity"][0]:
        relative = np.array(temporal["identity"], dtype=float) / temporal["identity"][0]
        axes[2].plot(temporal["gaps"], relative, color=GREY, linestyle="--", linewidth=1.4, label=BASELINE, zorder=1)


def _set_axes(axes: Any, metrics: Sequence[Metrics]) -> None:
    """Limits that hold for all models, grids and ticks."""
    from matplotlib.ticker import MaxNLocator

    axes[0].set_ylim(0, 1)
    rho = [value for one in metrics for value in one["rho"]["per_layer"] if value is not None]
    axes[1].set_ylim(min(-0.3, min(rho, default=0.0) - 0.1), 1)
    relative = np.concatenate([np.array(one["temporal"]["normalized"], dtype=float) for one in metrics])
    highest = np.nanmax(relative) if np.isfinite(relative).any() else 1.0
    axes[2].set_ylim(0, 1.1 * max(1.0, float(highest)))  # with few sequences the curve can rise above 1
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(True, color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    layers = [layer for one in metrics for layer in one["layers"]]
    for axis in axes[:2]:
        axis.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    if not rho:
        axes[1].text(0.5, 0.5, UNDEFINED, transform=axes[1].transAxes, ha="center")


def _line(
    axis: Any, x: Sequence[int], values: Sequence[Any], deviation: Any, style: Mapping[str, Any], label: str
) -> None:
    y, spread = np.array(values, dtype=float), np.array(deviation, dtype=float)
    axis.plot(x, y, label=label, **style)
    axis.fill_between(x, y - spread, y + spread, color=style["color"], alpha=0.15, linewidth=0)

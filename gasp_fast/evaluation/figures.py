"""The paper's Figure 3 for one model or several: PCK, confidence–accuracy correlation and temporal robustness.

Three panels, deviation over sequences shaded. Models differ by colour and by marker, so that the figure survives
colour-blind eyes and a black-and-white printer; axes have one scale for all models. Beside every PCK stand the
"same position" guess and the PCK of the points that moved. Knows reports as data; knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's colours, without the yellow, which is too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#6b6b6b"
KIND_NAMES = {"head": "correspondence head", "qk": "queries and keys", "hidden": "hidden states"}


def draw_figure(reports: Mapping[str, Mapping[str, Any]], kind: str, path: Path) -> Path:
    """`reports` by the name each is called in the legend; all must hold features of `kind`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    found = {name: report["by_features"][kind] for name, report in reports.items()}
    single = len(found) == 1
    for style, (name, one) in zip(_styles(len(found)), found.items(), strict=True):
        _draw_pck(axes[0], one, style, "all points" if single else name)
        _draw_rho(axes[1], one, style, name)
        label = f"layer {one['temporal']['layer']} (best)" if single else f"{name}, layer {one['temporal']['layer']}"
        if (first := one["temporal"]["pck"][0]) is not None:
            label += f": 1 is {first:.2f}"  # a curve of shares hides how much there was to lose
        _draw_temporal(axes[2], one, style, label, with_mean=single)
    _draw_baselines(axes, list(found.values()))
    _finish(axes, list(found.values()))
    for axis in (axes[0], axes[2]):
        axis.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    if not single:
        axes[1].legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    figure.suptitle(_title(reports, kind), fontsize=12)
    figure.savefig(path)
    return path


def _title(reports: Mapping[str, Mapping[str, Any]], kind: str) -> str:
    counts = " / ".join(map(str, sorted({report["sequences"] for report in reports.values()})))
    what = f"{KIND_NAMES[kind]}, {counts} sequences"
    return f"{next(iter(reports))}: {what}" if len(reports) == 1 else what[0].upper() + what[1:]


def _styles(count: int) -> list[dict[str, Any]]:
    return [
        {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)], "markersize": 4.5, "linewidth": 1.8}
        for n in range(count)
    ]


def _draw_pck(axis: Any, one: Mapping[str, Any], style: Mapping[str, Any], label: str) -> None:
    layers = one["layers"]
    _line(axis, layers, one["pck"]["per_layer"], one["pck"]["per_layer_std"], style, label)
    moved = _floats(one["pck_moved"]["per_layer"])
    axis.plot(layers, moved, color=style["color"], linestyle=(0, (1.2, 1.4)), linewidth=1.8)
    axis.set(title="Where is the point?", xlabel="layer", ylabel="PCK@2 (share of points found)")


def _draw_rho(axis: Any, one: Mapping[str, Any], style: Mapping[str, Any], label: str) -> None:
    _line(axis, one["layers"], one["rho"]["per_layer"], one["rho"]["per_layer_std"], style, label)
    axis.set(title="Does the model know when it is right?", xlabel="layer", ylabel="confidence–accuracy correlation ρ")


def _draw_temporal(axis: Any, one: Mapping[str, Any], style: Mapping[str, Any], label: str, with_mean: bool) -> None:
    temporal = one["temporal"]
    first = temporal["pck"][0]
    # Without an answer at gap 1 nothing can be divided by it, and the curve stays away.
    deviation = _floats(temporal["pck_std"]) / (first or np.nan)
    _line(axis, temporal["gaps"], temporal["normalized"], deviation, style, label)
    if with_mean:
        mean = _floats(temporal["mean_over_layers"]["normalized"])
        axis.plot(temporal["gaps"], mean, color=COLOURS[1], marker=MARKERS[1], markersize=3.5, label="mean over layers")
    axis.set(title="How long does a match hold?", xlabel="frames between", ylabel="PCK@2 relative to 1 frame")


def _draw_baselines(axes: Any, found: Sequence[Mapping[str, Any]]) -> None:
    """The "same position" guess; once, if all models were asked the same questions."""
    for number, identity in enumerate(sorted({round(one["identity"], 6) for one in found})):
        label = '"same position" guess' if number == 0 else None
        axes[0].axhline(identity, color=GREY, linestyle="--", linewidth=1.4, label=label, zorder=1)
    axes[0].plot([], [], color=GREY, linestyle=(0, (1.2, 1.4)), linewidth=1.8, label="points that moved (dotted)")
    axes[1].axhline(0, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
    temporal = found[0]["temporal"]
    if temporal["identity"][0]:
        relative = _floats(temporal["identity"]) / temporal["identity"][0]
        axes[2].plot(
            temporal["gaps"],
            relative,
            color=GREY,
            linestyle="--",
            linewidth=1.4,
            label='"same position" guess',
            zorder=1,
        )


def _finish(axes: Any, found: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes[0].set_ylim(0, 1)
    low = min((value for one in found for value in one["rho"]["per_layer"] if value is not None), default=0.0)
    axes[1].set_ylim(min(-0.3, low - 0.1), 1)
    relative = np.concatenate([_floats(one["temporal"]["normalized"]) for one in found])
    highest = np.nanmax(relative) if np.isfinite(relative).any() else 1.0
    axes[2].set_ylim(0, 1.1 * max(1.0, float(highest)))  # few sequences make a jagged curve: show all of it
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(True, color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:2]:
        layers = [layer for one in found for layer in one["layers"]]
        axis.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    if all(value is None for one in found for value in one["rho"]["per_layer"]):
        axes[1].text(
            0.5, 0.5, "not defined:\nall right, all wrong, or equally sure", transform=axes[1].transAxes, ha="center"
        )


def _line(
    axis: Any, x: Sequence[int], values: Sequence[Any], deviation: Any, style: Mapping[str, Any], label: str
) -> None:
    y, spread = _floats(values), _floats(deviation)
    axis.plot(x, y, label=label, **style)
    axis.fill_between(x, y - spread, y + spread, color=style["color"], alpha=0.15, linewidth=0)


def _floats(values: Any) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)

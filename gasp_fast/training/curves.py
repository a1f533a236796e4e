"""Curves of one run or of several runs over each other, from their `log.jsonl`.

Losses are unweighted. Of a single run, PCK on training batches is drawn for every head, and all measures on held-out
scenes; of several runs the mean over heads, and of held-out scenes the best layer with, dotted, the moved points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gasp_fast.drawing import COLOURS
from gasp_fast.files import read_json_lines
from gasp_fast.run_folder import LOG

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
LOSSES = {"lm": "language", "corr": "correspondence"}  # names for people; others have the name of the log
NUMBERS = ("grad_norm", "tokens_per_s")  # or null
NO_LOSSES = ("step", "loss", "lr", *NUMBERS, "mfu", "useful_share", "peak_memory", "data_wait", "device_wait")
HELD_OUT = {
    "pck": "PCK@2, mean of layers",
    "peak": "PCK@2, best layer",
    "moved": "PCK@2 of moved points",
    "rho": "ρ, confidence and accuracy",
}
NO_MEASURES = ("features", "layers", "peak_layer", "identity", "seconds")
MOST_COLUMNS = 4
DOTTED = (0, (1.2, 1.4))
DASHES = ("-", (0, (5, 2)), (0, (5, 1.5, 1.5, 1.5)))  # of runs in turn


@dataclass(frozen=True)
class RunLog:
    """The lines of a log that can be drawn."""

    records: list[Record]  # logged steps, all with as many heads as the last one
    evaluations: list[Record]  # steps with an evaluation on held-out scenes


def read_run(run: Path) -> RunLog:
    everything = read_log(run / LOG)
    records = [record for record in everything if _can_be_drawn(record)]
    records = [record for record in records if _shape(record) == _shape(records[-1])]
    return RunLog(records, [record for record in everything if _can_be_drawn_held_out(record)])


def read_log(path: Path) -> list[Record]:
    """The lines of a log that are whole: a damaged file must not end a run."""
    return [record for record in read_json_lines(path) if type(record.get("step")) is int]


def _can_be_drawn(record: Record) -> bool:
    """Whether the record has all that the table and the curves are made of."""
    row, losses = record.get("pck_per_layer", []), losses_of(record)
    known = isinstance(row, list) and losses and all(name in record for name in NUMBERS)
    if not known or abs(record["step"]) >= 1 << 53:
        return False
    values = [*(record[name] for name in (*losses, *NUMBERS)), record.get("lr"), *row]
    return all(value is None or (type(value) in (int, float) and abs(value) < 1e100) for value in values)


def measures_of(metrics: Mapping[str, Any]) -> list[str]:
    """The names of an evaluation's measures, each from 0 to 1 or undefined."""
    return [
        name for name, value in metrics.items() if name not in NO_MEASURES and not isinstance(value, int | str | list)
    ]


def losses_of(record: Record) -> list[str]:
    """The names of the loss's terms, in the order of the log."""
    return [name for name, value in record.items() if name not in NO_LOSSES and not isinstance(value, list | dict)]


def named_losses(records: Sequence[Record]) -> dict[str, str]:
    """The terms that at least one record has, and what people call them."""
    keys = [key for record in records for key in losses_of(record) if record[key] is not None]
    return {key: LOSSES.get(key, key) for key in dict.fromkeys(keys)}


def _shape(record: Record) -> tuple[list[str], int]:
    """What all records of a table or a figure have in common: the terms and the number of heads."""
    return losses_of(record), len(record.get("pck_per_layer", []))


def _can_be_drawn_held_out(record: Record) -> bool:
    metrics = record.get("held_out")
    if not isinstance(metrics, dict) or not measures_of(metrics) or abs(record["step"]) >= 1 << 53:
        return False
    values = [metrics[name] for name in measures_of(metrics)]
    return all(value is None or (type(value) in (int, float) and abs(value) <= 1) for value in values)


# ---- the figure -----------------------------------------------------------------------------------------------------

Panel = tuple[str, Callable[[Any], None]]  # title, and what draws into its axes


def draw_curves(runs: Mapping[str, RunLog]) -> Figure:
    """The curves of each run, named by its key in the legend. Every run has records."""
    from matplotlib.figure import Figure

    panels = _panels(runs)
    columns = min(MOST_COLUMNS, (len(panels) + 1) // 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, draw) in zip(axes, panels, strict=False):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        draw(axis)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    if len(runs) > 1:
        from matplotlib.lines import Line2D

        lines = [
            Line2D([], [], color=_colour(number), linestyle=_dashes(number), label=name)
            for number, name in enumerate(runs)
        ]
        figure.legend(handles=lines, loc="outside lower center", ncols=len(runs), frameon=False)
    return figure


def _panels(runs: Mapping[str, RunLog]) -> list[Panel]:
    """Those for which at least one run has numbers."""
    panels: list[Panel] = [
        (f"{name.capitalize()} loss", partial(_draw_key, runs=runs, key=key))
        for key, name in named_losses([record for run in runs.values() for record in run.records]).items()
    ]
    if any(np.isfinite(_pck(run)).any() for run in runs.values()):
        panels.append(("PCK@2 on training batches", partial(_draw_pck, runs=runs)))
    if any(run.evaluations for run in runs.values()):
        panels.append(("On held-out scenes", partial(_draw_held_out, runs=runs)))
    panels.append(("Learning rate", partial(_draw_key, runs=runs, key="lr")))
    panels.append(("Norm of the gradient, before clipping", partial(_draw_key, runs=runs, key="grad_norm")))
    return panels


def _draw_key(axis: Any, runs: Mapping[str, RunLog], key: str) -> None:
    """A learning rate; or losses and norms above zero, logarithmic if they differ by more than a factor of 3."""
    rows = [floats([record.get(key) for record in run.records]) for run in runs.values()]
    if key != "lr":
        rows = [np.where(values > 0, values, np.nan) for values in rows]
    for number, (run, values) in enumerate(zip(runs.values(), rows, strict=True)):
        _curve(axis, run, values, number, smooth=key != "lr")
    known = np.concatenate(rows)
    known = known[~np.isnan(known)]
    if key != "lr" and len(known) and known.max() > 3 * known.min():
        from matplotlib.ticker import LogLocator, NullFormatter

        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")  # 0.1, not 10 to the power of −1
        axis.yaxis.set_minor_formatter(NullFormatter())


def _draw_pck(axis: Any, runs: Mapping[str, RunLog]) -> None:
    """Every head of a single run, as colours; else the mean over heads."""
    if len(runs) == 1:
        _draw_heads(axis, next(iter(runs.values())))
        return
    for number, run in enumerate(runs.values()):
        if (pck := _pck(run)).size:
            _curve(axis, run, pck.mean(1), number)
    axis.set(ylim=(0, 1), ylabel="mean over heads")


def _draw_heads(axis: Any, run: RunLog) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, pck = _steps(run), _pck(run)  # [steps], [steps, L]
    layers = pck.shape[1]
    edges = np.concatenate([[2 * steps[0] - steps[1] if len(steps) > 1 else steps[0] - 1], steps])
    axis.grid(False)
    mesh = axis.pcolormesh(edges, np.arange(layers + 1) + 0.5, pck.T, cmap="viridis", vmin=0, vmax=1, rasterized=True)
    axis.set_ylabel("head")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.figure.colorbar(mesh, ax=axis)


def _draw_held_out(axis: Any, runs: Mapping[str, RunLog]) -> None:
    keys = [key for run in runs.values() for record in run.evaluations for key in measures_of(record["held_out"])]
    shown = {key: HELD_OUT.get(key, key) for key in dict.fromkeys(keys)}
    if len(runs) > 1 and "moved" in shown:
        shown = {key: HELD_OUT[key] for key in ("peak", "moved")}
    for number, run in enumerate(runs.values()):
        steps = [record["step"] for record in run.evaluations]
        for place, (key, name) in enumerate(shown.items()):
            values = floats([record["held_out"].get(key) for record in run.evaluations])
            colour, style = (_colour(place), "-") if len(runs) == 1 else (_colour(number), DOTTED if place else "-")
            axis.plot(steps, values, color=colour, linestyle=style, marker="o", markersize=3, label=name)
    if len(runs) == 1:
        axis.legend(frameon=False, fontsize=9)
    else:
        axis.set_ylabel("PCK@2, best layer; dotted: moved")


def _curve(axis: Any, run: RunLog, y: NDArray[np.float64], number: int, smooth: bool = True) -> None:
    """The curve of a run by its number; faint, with its running mean, where it is `smooth`."""
    x = _steps(run)[~np.isnan(y)]
    y = y[~np.isnan(y)]
    if not len(y):
        return
    style = {"color": _colour(number), "linestyle": _dashes(number), "linewidth": 1.8}
    if not smooth:
        axis.plot(x, y, **style)
        return
    axis.plot(x, y, color=_colour(number), alpha=0.25, linewidth=0.8)
    width = max(1, len(y) // 25)
    sums = np.cumsum(np.concatenate([[0.0], y]))
    begin = np.maximum(np.arange(len(y)) + 1 - width, 0)
    axis.plot(x, (sums[1:] - sums[begin]) / (np.arange(len(y)) + 1 - begin), **style)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _dashes(number: int) -> Any:
    """Equal curves over each other remain visible."""
    return DASHES[number % len(DASHES)]


def _steps(run: RunLog) -> NDArray[np.float64]:
    return floats([record["step"] for record in run.records])


def _pck(run: RunLog) -> NDArray[np.float64]:
    return floats([record.get("pck_per_layer", []) for record in run.records])  # [steps, L]


def floats(values: Sequence[Any]) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)  # None becomes NaN

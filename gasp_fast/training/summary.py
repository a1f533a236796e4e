"""The summary of a finished run: `training.png`, and a table of its first and last numbers.

Both are made from `log.jsonl` alone, which holds the whole run, however often it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from gasp_fast.files import read_json_lines, replacing
from gasp_fast.run_folder import BEST, FIGURE, LOG, SKIPPED

from .skipped import KINDS, in_numbers, left_out

Record = dict[str, Any]
COLOURS = {"lm": "#0072B2", "corr": "#D55E00", "depth": "#009E73"}  # Okabe and Ito's
NUMBERS = (*COLOURS, "grad_norm", "tokens_per_s")  # or null
WAITS = {"data_wait": "waiting for data", "device_wait": "host waiting for the GPU"}
HELD_OUT = {  # name and colour
    "pck": ("PCK@2, mean of layers", "#0072B2"),
    "peak": ("PCK@2, best layer", "#D55E00"),
    "moved": ("PCK@2 of moved points", "#009E73"),
    "rho": ("ρ, confidence and accuracy", "#CC79A7"),
}
NAMES = {"lm": "language", "corr": "correspondence", "depth": "depth"}


def summarise(run: Path, console: Console, shown: bool) -> None:
    """Draw the run; if `shown`, print what changed and the commands that come next."""
    everything = read_log(run / LOG)
    records = [record for record in everything if _can_be_drawn(record)]
    evaluations = [record for record in everything if _can_be_drawn_held_out(record)]
    records = [record for record in records if len(record["pck_per_layer"]) == len(records[-1]["pck_per_layer"])]
    if not records:
        return
    picture = draw(records, run / FIGURE, evaluations)
    if shown:
        console.print(as_table(records, evaluations))
        console.print(f"all steps: {picture}", highlight=False, soft_wrap=True)
        if line := _skipped(run):
            console.print(line, highlight=False, soft_wrap=True)
        model = run / BEST if evaluations and (run / BEST).exists() else run
        console.print(
            f"next: gasp-fast export {model}; gasp-fast evaluate --model {model} --scenes DIR", soft_wrap=True
        )


def read_log(path: Path) -> list[Record]:
    """The lines of a log that are whole: a damaged file must not end a run."""
    return [record for record in read_json_lines(path) if type(record.get("step")) is int]


def _can_be_drawn(record: Record) -> bool:
    """Whether the record has all that the table and the curves are made of."""
    row = record.get("pck_per_layer")
    if not isinstance(row, list) or not all(name in record for name in NUMBERS) or abs(record["step"]) >= 1 << 53:
        return False
    values = [*(record[name] for name in NUMBERS), *row]
    return all(value is None or (type(value) in (int, float) and abs(value) < 1e100) for value in values)


def _skipped(run: Path) -> str:
    """How many samples could not be used, by kind; empty if none."""
    counts = [record["skipped"] for record in read_log(run / LOG) if isinstance(record.get("skipped"), dict)]
    replaced = {kind: sum(n for one in counts if type(n := one.get(kind)) is int) for kind in KINDS}
    parts = [("left out before the run", left_out(run)), ("replaced while it ran", replaced)]
    words = "; ".join(f"{what} {in_numbers(count)}" for what, count in parts if any(count.values()))
    return f"{words}; {run / SKIPPED} names them" if words else ""


def _can_be_drawn_held_out(record: Record) -> bool:
    metrics = record.get("held_out")
    if not isinstance(metrics, dict) or abs(record["step"]) >= 1 << 53:
        return False
    values = [metrics.get(name) for name in HELD_OUT]
    return all(value is None or (type(value) in (int, float) and abs(value) <= 1) for value in values)


def as_table(records: Sequence[Record], evaluations: Sequence[Record] = ()) -> Table:
    """The means of the first and of the last tenth of the run: a single batch says little.

    Evaluations on held-out scenes are many batches each: of these, the first and the last one.
    """
    tenth = max(1, len(records) // 10)
    parts = (records[:tenth], records[-tenth:])
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"over {records[-1]['step']} steps")
    for title in ("first tenth", "last tenth"):
        table.add_column(title, justify="right")
    for key, name in NAMES.items():
        if any(record[key] is not None for record in records):
            table.add_row(f"{name} loss", *(f"{_mean(part, key):.3f}" for part in parts))
    pck = [_per_layer(part) for part in parts]
    if pck[-1].size and not np.isnan(pck[-1]).all():
        best = int(np.nanargmax(pck[-1]))
        table.add_row("PCK@2, mean of layers", *(f"{np.nanmean(layers):.3f}" for layers in pck))
        table.add_row(f"PCK@2, head {best + 1} of {len(pck[-1])}", *(f"{layers[best]:.3f}" for layers in pck))
    for key, (name, _) in HELD_OUT.items() if evaluations else ():
        values = [evaluations[at]["held_out"][key] for at in (0, -1)]
        table.add_row(f"held out: {name}", *("–" if value is None else f"{value:.3f}" for value in values))
    table.add_row("tokens per second", *(f"{_mean(part, 'tokens_per_s'):,.0f}" for part in parts))
    for key, name in WAITS.items():
        shares = [[share for record in part if type(share := record.get(key)) is float] for part in parts]
        if all(shares):  # logs of earlier versions have none
            table.add_row(name, *(f"{np.mean(part):.1%}" for part in shares))
    return table


def draw(records: Sequence[Record], path: Path, evaluations: Sequence[Record] = ()) -> Path:
    """Draw losses, PCK of each supervised layer, evaluations, and the norm of the gradient over the steps."""
    from matplotlib.figure import Figure

    pck = _floats([record["pck_per_layer"] for record in records])  # [steps, L]
    heads = bool(pck.size and not np.isnan(pck).all())
    panels = 2 + heads + bool(evaluations)
    figure = Figure(figsize=(4.6 * panels, 3.9), dpi=130, layout="constrained")
    axes = figure.subplots(1, panels)
    steps = _floats([record["step"] for record in records])
    for key, name in NAMES.items():
        _curve(axes[0], steps, _floats([record[key] for record in records]), COLOURS[key], name)
    axes[0].set(title="Losses, unweighted", yscale="log")
    if axes[0].lines:
        axes[0].legend(frameon=False, fontsize=9)
    _curve(axes[-1], steps, _floats([record["grad_norm"] for record in records]), "#444444", "")
    axes[-1].set(title="Norm of the gradient, before clipping", yscale="log")
    if heads:
        _draw_pck(figure, axes[1], steps, pck)
    if evaluations:
        _draw_held_out(axes[-2], evaluations)
    for axis in axes:
        axis.set_xlabel("step")
        if not heads or axis is not axes[1]:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
    return path


def _draw_pck(figure: Any, axis: Any, steps: NDArray[np.float64], pck: NDArray[np.float64]) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = pck.shape[1]
    edges = np.concatenate([[2 * steps[0] - steps[1] if len(steps) > 1 else steps[0] - 1], steps])
    mesh = axis.pcolormesh(edges, np.arange(layers + 1) + 0.5, pck.T, cmap="viridis", vmin=0, vmax=1, rasterized=True)
    axis.set(title="PCK@2 of each head, on training batches", ylabel="head")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(mesh, ax=axis)


def _draw_held_out(axis: Any, evaluations: Sequence[Record]) -> None:
    steps = [record["step"] for record in evaluations]
    for key, (name, colour) in HELD_OUT.items():
        values = _floats([record["held_out"][key] for record in evaluations])
        axis.plot(steps, values, color=colour, marker="o", markersize=3, label=name)
    axis.set(title="Correspondence on held-out scenes")
    axis.legend(frameon=False, fontsize=9)


def _curve(axis: Any, x: NDArray[np.float64], y: NDArray[np.float64], colour: str, label: str) -> None:
    """Draw a curve, faint, and its running mean."""
    known = ~np.isnan(y) & (y > 0)
    x, y = x[known], y[known]
    if not len(y):
        return
    axis.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
    width = max(1, len(y) // 25)
    sums = np.cumsum(np.concatenate([[0.0], y]))
    begin = np.maximum(np.arange(len(y)) + 1 - width, 0)
    axis.plot(x, (sums[1:] - sums[begin]) / (np.arange(len(y)) + 1 - begin), color=colour, linewidth=1.8, label=label)


def _per_layer(records: Sequence[Record]) -> NDArray[np.float64]:
    """Mean PCK of each layer, [L], over the records that have it."""
    rows = _floats([record["pck_per_layer"] for record in records])  # [steps, L]
    known = ~np.isnan(rows)
    sums, counts = np.where(known, rows, 0).sum(0), known.sum(0)
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def _mean(records: Sequence[Record], key: str) -> float:
    known = [record[key] for record in records if record[key] is not None]
    return sum(known) / len(known) if known else float("nan")


def _floats(values: Sequence[Any]) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)  # None becomes NaN

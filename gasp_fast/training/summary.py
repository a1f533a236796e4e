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

from gasp_fast.data.errors import reading
from gasp_fast.files import parse_json
from gasp_fast.run_folder import FIGURE, LOG

Record = dict[str, Any]
COLOURS = {"lm": "#0072B2", "corr": "#D55E00", "depth": "#009E73"}  # Okabe and Ito's
NUMBERS = (*COLOURS, "grad_norm", "tokens_per_s")  # or null
NAMES = {"lm": "language", "corr": "correspondence", "depth": "depth"}


def summarise(run: Path, console: Console, shown: bool) -> None:
    """Draw the run; if `shown`, print what changed and the commands that come next."""
    records = [record for record in read_log(run / LOG) if _can_be_drawn(record)]
    records = [record for record in records if len(record["pck_per_layer"]) == len(records[-1]["pck_per_layer"])]
    if not records:
        return
    picture = draw(records, run / FIGURE)
    if shown:
        console.print(as_table(records))
        console.print(f"all steps: {picture}", highlight=False, soft_wrap=True)
        console.print(f"next: gasp-fast export {run}; gasp-fast evaluate --model {run} --scenes DIR", soft_wrap=True)


def read_log(path: Path) -> list[Record]:
    """The lines of a log that are whole. A killed run leaves half a line, and a damaged file must not end a run."""
    if not path.exists():
        return []
    with reading(path, "log"):
        lines = path.read_bytes().splitlines()
    records = []
    for line in lines:
        try:
            record = parse_json(line, str(path))
        except ValueError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records


def _can_be_drawn(record: Record) -> bool:
    """Whether the record has all that the table and the curves are made of."""
    row = record.get("pck_per_layer")
    if not isinstance(row, list) or not all(name in record for name in NUMBERS) or abs(record["step"]) >= 1 << 53:
        return False
    values = [*(record[name] for name in NUMBERS), *row]
    return all(value is None or (type(value) in (int, float) and abs(value) < 1e100) for value in values)


def as_table(records: Sequence[Record]) -> Table:
    """The means of the first and of the last tenth of the run: a single batch says little."""
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
    table.add_row("tokens per second", *(f"{_mean(part, 'tokens_per_s'):,.0f}" for part in parts))
    return table


def draw(records: Sequence[Record], path: Path) -> Path:
    """Draw losses, PCK of each supervised layer, and the norm of the gradient over the steps."""
    from matplotlib.figure import Figure

    pck = _floats([record["pck_per_layer"] for record in records])  # [steps, L]
    panels = 3 if pck.size and not np.isnan(pck).all() else 2
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
    if panels == 3:
        _draw_pck(figure, axes[1], steps, pck)
    for axis in axes:
        axis.set_xlabel("step")
        if axis is not axes[-2] or panels == 2:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def _draw_pck(figure: Any, axis: Any, steps: NDArray[np.float64], pck: NDArray[np.float64]) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = pck.shape[1]
    edges = np.concatenate([[2 * steps[0] - steps[1] if len(steps) > 1 else steps[0] - 1], steps])
    mesh = axis.pcolormesh(edges, np.arange(layers + 1) + 0.5, pck.T, cmap="viridis", vmin=0, vmax=1, rasterized=True)
    axis.set(title="PCK@2 of each head, on training batches", ylabel="head")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(mesh, ax=axis)


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

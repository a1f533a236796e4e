"""The summary of a finished run: `training.png`, and a table of its first and last numbers.

Both are made from `log.jsonl` alone, which holds the whole run, however often it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from gasp_fast.drawing import save_figure
from gasp_fast.run_folder import BEST, FIGURE, LOG, SKIPPED

from .curves import HELD_OUT, Record, draw_curves, floats, measures_of, named_losses, read_log, read_run
from .skipped import KINDS, in_numbers, left_out

WAITS = {"data_wait": "waiting for data", "device_wait": "host waiting for the GPU"}


def summarise(run: Path, console: Console, shown: bool, next_command: str) -> None:
    """Draw the run; if `shown`, print what changed and the commands that come next, about `{model}`."""
    log = read_run(run)
    records, evaluations = log.records, log.evaluations
    if not records:
        return
    picture = save_figure(draw_curves({run.name: log}), run / FIGURE)
    if shown:
        console.print(as_table(records, evaluations))
        console.print(f"all steps: {picture}", highlight=False, soft_wrap=True)
        if line := _skipped(run):
            console.print(line, highlight=False, soft_wrap=True)
        model = run / BEST if evaluations and (run / BEST).exists() else run
        console.print(f"next: {next_command.format(model=model)}", soft_wrap=True)


def _skipped(run: Path) -> str:
    """How many samples could not be used, by kind; empty if none."""
    counts = [record["skipped"] for record in read_log(run / LOG) if isinstance(record.get("skipped"), dict)]
    replaced = {kind: sum(n for one in counts if type(n := one.get(kind)) is int) for kind in KINDS}
    parts = [("left out before the run", left_out(run)), ("replaced while it ran", replaced)]
    words = "; ".join(f"{what} {in_numbers(count)}" for what, count in parts if any(count.values()))
    return f"{words}; {run / SKIPPED} names them" if words else ""


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
    for key, name in named_losses(records).items():
        table.add_row(f"{name} loss", *(f"{_mean(part, key):.3f}" for part in parts))
    pck = [_per_layer(part) for part in parts]
    if pck[-1].size and not np.isnan(pck[-1]).all():
        best = int(np.nanargmax(pck[-1]))
        table.add_row("PCK@2, mean of layers", *(f"{np.nanmean(layers):.3f}" for layers in pck))
        table.add_row(f"PCK@2, head {best + 1} of {len(pck[-1])}", *(f"{layers[best]:.3f}" for layers in pck))
    for key in measures_of(evaluations[-1]["held_out"]) if evaluations else ():
        name = HELD_OUT.get(key, key)
        values = [evaluations[at]["held_out"].get(key) for at in (0, -1)]
        table.add_row(f"held out: {name}", *("–" if value is None else f"{value:.3f}" for value in values))
    table.add_row("tokens per second", *(f"{_mean(part, 'tokens_per_s'):,.0f}" for part in parts))
    for key, name in WAITS.items():
        shares = [[share for record in part if type(share := record.get(key)) is float] for part in parts]
        if all(shares):  # logs of earlier versions have none
            table.add_row(name, *(f"{np.mean(part):.1%}" for part in shares))
    return table


def _per_layer(records: Sequence[Record]) -> NDArray[np.float64]:
    """Mean PCK of each layer, [L], over the records that have it."""
    rows = floats([record.get("pck_per_layer", []) for record in records])  # [steps, L]
    known = ~np.isnan(rows)
    sums, counts = np.where(known, rows, 0).sum(0), known.sum(0)
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def _mean(records: Sequence[Record], key: str) -> float:
    known = [record[key] for record in records if record[key] is not None]
    return sum(known) / len(known) if known else float("nan")

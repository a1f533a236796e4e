"""The main metrics of one report or several as a table, for the terminal and for the page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

Report = Mapping[str, Any]  # content of report.json

COLUMNS = {  # as in the tables: what it holds
    "PCK@2": "share of points found within 2 patches, by the best layer",
    "layer": "the best layer",
    "mean": "PCK@2, mean over layers",
    "moved": "PCK@2 of points that moved more than 2 patches",
    "same": "PCK@2 of predicting the same position (identity)",
    "ρ": "confidence–accuracy correlation",
    "gap n": "PCK@2 in frames n apart",
}


def table_rows(reports: Mapping[str, Report], kinds: Sequence[str] | None = None) -> list[list[str]]:
    """A row of headings, then one row for each model and kind of features; `kinds` defaults to all of each report."""
    chosen = [
        (name, kind, report["by_features"][kind])
        for name, report in reports.items()
        for kind in kinds or report["by_features"]
    ]
    temporals = [metrics["temporal"] for _, _, metrics in chosen]
    defined = [{gap for gap, pck in zip(one["gaps"], one["pck"], strict=True) if pck is not None} for one in temporals]
    largest = max(set.intersection(*defined), default=1)  # the largest gap at which all have correspondences
    rows = [["model", "features", *list(COLUMNS)[:-1], "gap 1", f"gap {largest}"]]
    for name, kind, metrics in chosen:
        layer, temporal = metrics["pck"]["peak_layer"], metrics["temporal"]
        best = metrics["layers"].index(layer)
        values = (
            metrics["pck"]["mean"],
            metrics["pck_moved"]["per_layer"][best],
            metrics["identity"],
            metrics["rho"]["per_layer"][best],
            temporal["pck"][0],
            temporal["pck"][temporal["gaps"].index(largest)],
        )
        rows.append([name, kind, _number(metrics["pck"]["peak"]), str(layer), *map(_number, values)])
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def terminal_table(reports: Mapping[str, Report], kinds: Sequence[str] | None = None) -> Table:
    """For the terminal, with a legend; a single report has no column for the model."""
    legend = "; ".join(f"{column}: {meaning}" for column, meaning in COLUMNS.items())
    table = Table(box=None, pad_edge=False, header_style="bold", caption=legend, caption_justify="left")
    headings, *rows = [row if len(reports) > 1 else row[1:] for row in table_rows(reports, kinds)]
    for heading in headings:
        text = heading in ("model", "features")
        table.add_column(heading, justify="left" if text else "right", overflow="fold", no_wrap=heading != "model")
    for row in rows:
        table.add_row(*row)
    return table


def html_table(reports: Mapping[str, Report], kinds: Sequence[str] | None = None) -> str:
    headings, *rows = table_rows(reports, kinds)
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in headings)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"

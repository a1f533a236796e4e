"""The metrics of one report or several as tables, for the terminal and for the page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from gasp_fast.loss.function import PCK_RADIUS

Report = Mapping[str, Any]  # content of report.json

_KINDS = {"head": "correspondence head", "qk": "queries and keys", "hidden": "hidden states"}
KIND_NAMES = {  # of what is measured: features in the forward or the causal direction
    name: text
    for kind, words in _KINDS.items()
    for name, text in ((kind, words), (f"{kind}-causal", f"{words}, causal"))
}
# Columns of the two tables and what they hold. `{pck}` is PCK@2, or another radius.
FOUND = {
    "{pck}": "share of points found within {radius:g} patches, by the best layer",
    "layer": "the best layer",
    "mean": "{pck}, mean over layers",
    "moved": "{pck} of points that moved more than {radius:g} patches",
    "same": "{pck} of predicting the same position (identity)",
    "constant": "{pck} of always predicting the best constant token",
    "chance": "{pck} of random predictions",
}
FURTHER = {
    "frequent": "share of the best layer's predictions that are its most frequent token",
    "ρ": "confidence–accuracy correlation",
    "δ_avg": "TAP-Vid's mean share of points within 1, 2, 4, 8 and 16 pixels at 256 × 256",
    "δ max": "δ_avg of predicting the true token: predictions are centres of tokens",
    "group": "{pck} of the best head group of any layer",
    "gap n": "{pck} in frames n apart",
}


def radius_of(report: Report) -> float:
    """The radius of a report's PCK; reports of the first versions do not name theirs."""
    return float(report.get("settings", {}).get("radius", PCK_RADIUS))


def pck_name(reports: Mapping[str, Report]) -> str:
    """`PCK@2`, or with another radius. Raises if the reports have different ones."""
    radii = {radius_of(report) for report in reports.values()}
    if len(radii) > 1:
        text = ", ".join(f"{name}: {radius_of(report):g}" for name, report in reports.items())
        raise ValueError(f"the reports have different radii ({text}); evaluate again with the same --radius")
    return f"PCK@{radii.pop():g}"


def definitions(reports: Mapping[str, Report], columns: Mapping[str, str]) -> dict[str, str]:
    """Names and meanings of columns, with the radius of the reports."""
    facts = {"pck": pck_name(reports), "radius": radius_of(next(iter(reports.values())))}
    return {name.format(**facts): meaning.format(**facts) for name, meaning in columns.items()}


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
    headings = [*definitions(reports, FOUND), *list(FURTHER)[:-1], "gap 1", f"gap {largest}"]
    return [["model", "features", *headings], *([name, kind, *_cells(one, largest)] for name, kind, one in chosen)]


def _cells(metrics: Mapping[str, Any], largest: int) -> list[str]:
    """The cells of a row; a dash for what is undefined, or not in a report of an earlier version."""
    pck, temporal = metrics["pck"], metrics["temporal"]
    best = metrics["layers"].index(pck["peak_layer"])

    def of_best_layer(name: str) -> float | None:
        return metrics[name]["per_layer"][best] if name in metrics else None

    found = (pck["mean"], of_best_layer("pck_moved"), metrics["identity"], pck.get("constant"), pck.get("chance"))
    further = (
        of_best_layer("most_frequent"),
        of_best_layer("rho"),
        of_best_layer("delta_avg"),
        metrics.get("delta_avg", {}).get("ceiling"),
        metrics.get("pck_groups", {}).get("peak"),
        temporal["pck"][0],
        temporal["pck"][temporal["gaps"].index(largest)],
    )
    return [_number(pck["peak"]), str(pck["peak_layer"]), *map(_number, (*found, *further))]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def terminal_table(reports: Mapping[str, Report], kinds: Sequence[str] | None = None) -> Group:
    """Two tables for the terminal, with legends; a single report has no column for the model."""
    rows = [row if len(reports) > 1 else row[1:] for row in table_rows(reports, kinds)]
    names = 2 if len(reports) > 1 else 1  # columns of names
    middle = names + len(FOUND)
    found, further = ([row[:middle] for row in rows], [row[:names] + row[middle:] for row in rows])
    return Group(
        terminal_rows(found, definitions(reports, FOUND)), "", terminal_rows(further, definitions(reports, FURTHER))
    )


def terminal_rows(
    rows: Sequence[Sequence[str]], meanings: Mapping[str, str], text: Sequence[str] = ("model",)
) -> Table:
    """Rows below a row of headings; columns named in `text` are not numbers, and fold where the terminal is narrow."""
    legend = "; ".join(f"{column}: {meaning}" for column, meaning in meanings.items())
    table = Table(box=None, pad_edge=False, header_style="bold", caption=legend or None, caption_justify="left")
    for heading in rows[0]:
        words = heading in (*text, "features")
        table.add_column(heading, justify="left" if words else "right", overflow="fold", no_wrap=heading not in text)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def html_tables(reports: Mapping[str, Report], kinds: Sequence[str] | None = None) -> list[str]:
    """The two tables of the terminal."""
    rows = table_rows(reports, kinds)
    middle = 2 + len(FOUND)
    return [html_rows([row[:middle] for row in rows]), html_rows([row[:2] + row[middle:] for row in rows])]


def html_rows(rows: Sequence[Sequence[str]]) -> str:
    """Rows below a row of headings."""
    headings, *cells = rows
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in headings)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in cells]
    return '<div class="scroll"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def bars(reports: Mapping[str, Report], kinds: Sequence[str] | None = None) -> list[str]:
    """PCK of each model as a bar, above that of predicting the same position: what a reader sees first."""
    last = list(reports.values())[-1]
    kind = last["features"] if kinds is None or last["features"] in kinds else kinds[0]
    metrics = {name: report["by_features"][kind] for name, report in reports.items()}
    values = [(name, one["pck"]["peak"], f", layer {one['pck']['peak_layer']}", "") for name, one in metrics.items()]
    values.append(("same position in every frame", last["by_features"][kind]["identity"], "", "guess"))
    meaning = definitions(reports, {"{pck}": FOUND["{pck}"]})
    heading = html.escape("; ".join(f"{name}: {text}. Features: {KIND_NAMES[kind]}" for name, text in meaning.items()))
    rows = [
        f"<span>{html.escape(name)}</span>"
        f'<span class="bar {style}"><span style="width:{100 * value:.1f}%"></span></span>'
        f'<span class="number">{value:.3f}{layer}</span>'
        for name, value, layer, style in values
    ]
    return [f"<p>{heading}</p>", f'<div class="bars">{"".join(rows)}</div>']


def group_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """PCK of each head group in each layer, below a row of headings."""
    groups = metrics["pck_groups"]
    rows = [["layer", "all heads", "mean of groups", *(f"group {n + 1}" for n in range(len(groups["per_layer"][0])))]]
    columns = (metrics["layers"], metrics["pck"]["per_layer"], groups["mean_per_layer"], groups["per_layer"])
    for layer, pck, mean, of_groups in zip(*columns, strict=True):
        rows.append([str(layer), *map(_number, (pck, mean, *of_groups))])
    return rows

"""An evaluation as files: `report.json`, the figures, and one page that shows them. Several reports as one comparison.

Every file is written under a temporary name and renamed. The page holds its pictures inside, so that it can be sent
as one file. Knows reports as data; knows no model.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gasp_fast.files import write_atomically

from .figures import KIND_NAMES, draw_figure

Report = Mapping[str, Any]
# What two reports must have in common to be compared number by number.
COMPARABLE = ("frames", "grid", "scenes", "settings")


def write_report(report: Report, folder: Path, pictures: Sequence[tuple[str, Path]] = ()) -> Path:
    """`report.json`, a figure for each kind of features and `index.html`; `pictures` are (caption, PNG)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    name = str(report["model"])
    figures = [
        (KIND_NAMES[kind].capitalize(), _drawn({name: report}, kind, folder / f"figure-{kind}.png"))
        for kind in report["by_features"]
    ]
    parts = [_facts(report), _table({name: report})]
    parts += [_image(caption, path) for caption, path in figures]
    parts += ["<h2>What it looks like</h2>"] * bool(pictures) + [_image(*one) for one in pictures]
    return _write_page(folder, f"What {name} knows of correspondence", parts)


def read_report(path: Path) -> dict[str, Any]:
    """From `report.json` or the folder that holds it (or a run's `report/`)."""
    candidates = [path, path / "report.json", path / "report" / "report.json"]
    file = next((one for one in candidates if one.is_file()), None)
    if file is None:
        raise OSError(f"{path}: no report.json here; make one with gasp-fast evaluate")
    try:
        report = json.loads(file.read_text())
        _ = report["model"], report["by_features"][report["features"]]["pck"]["per_layer"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a report of gasp-fast evaluate ({error})") from error
    return report


def write_comparison(
    reports: Mapping[str, Report],
    folder: Path,
    pictures: Sequence[tuple[str, Path]] = (),
    title: str | None = None,
    introduction: str = "",
) -> tuple[Path, list[str]]:
    """Several reports in one figure for each kind of features they share. Returns the page, and what to beware of.

    `pictures` are (caption, PNG); `introduction` is HTML, and opens the page under its `title`.
    """
    kinds = [kind for kind in KIND_NAMES if all(kind in report["by_features"] for report in reports.values())]
    if not kinds:
        held = "; ".join(f"{name}: {', '.join(report['by_features'])}" for name, report in reports.items())
        raise ValueError(f"the reports share no kind of features ({held}); evaluate with the same --features")
    folder.mkdir(parents=True, exist_ok=True)
    warnings = _differences(reports)
    figures = [(KIND_NAMES[kind].capitalize(), _drawn(reports, kind, folder / f"compare-{kind}.png")) for kind in kinds]
    write_atomically(
        folder / "compare.json", (json.dumps({"kinds": kinds, "reports": reports}, indent=1) + "\n").encode()
    )
    parts = [introduction, *(f"<p class=warn>{html.escape(warning)}</p>" for warning in warnings)]
    parts += [_table(reports, kinds), *(_image(*figure) for figure in [*pictures[:1], *figures, *pictures[1:]])]
    return _write_page(folder, title or "Comparison: " + ", ".join(reports), parts), warnings


def table_rows(reports: Mapping[str, Report], kinds: Sequence[str] | None = None) -> list[list[str]]:
    """The figures one would quote, one row for each model and kind of features, under a row of headings."""
    chosen = [
        (name, kind, report["by_features"][kind])
        for name, report in reports.items()
        for kind in kinds or report["by_features"]
    ]
    far = _farthest_gap([one["temporal"] for _, _, one in chosen])
    rows = [["model", "features", "PCK@2", "layer", "mean", "moved", "same", "ρ", "gap 1", f"gap {far}"]]
    for name, kind, one in chosen:
        best = one["layers"].index(one["pck"]["peak_layer"])
        values = (
            one["pck"]["mean"],
            one["pck_moved"]["per_layer"][best],
            one["identity"],
            one["rho"]["per_layer"][best],
            one["temporal"]["pck"][0],
            _at_gap(one["temporal"], far),
        )
        layer = str(one["pck"]["peak_layer"])
        rows.append([name, kind, _number(one["pck"]["peak"]), layer, *map(_number, values)])
    return rows


def _farthest_gap(temporals: Sequence[Mapping[str, Any]]) -> int:
    """The largest gap that all were asked about."""
    shared = set.intersection(
        *({gap for gap, pck in zip(one["gaps"], one["pck"], strict=True) if pck is not None} for one in temporals)
    )
    return max(shared, default=1)


def _at_gap(temporal: Mapping[str, Any], gap: int) -> float | None:
    return temporal["pck"][temporal["gaps"].index(gap)]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _differences(reports: Mapping[str, Report]) -> list[str]:
    first_name, first = next(iter(reports.items()))
    return [
        f"{name} and {first_name} were asked different questions ({field}): their figures are not strictly comparable"
        for name, report in reports.items()
        for field in COMPARABLE
        if report.get(field) != first.get(field)
    ]


def _drawn(reports: Mapping[str, Report], kind: str, path: Path) -> Path:
    partial = path.with_name(f".{path.stem}.partial.png")
    draw_figure(reports, kind, partial)
    partial.replace(path)
    return path


# ---- the page -------------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 15px; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
figure { margin: 2rem 0 } img { max-width: 100%; height: auto } figcaption { color: #555 }
.warn { background: #fff3cd; padding: .5rem 1rem } dt { font-weight: 600 } dd { margin: 0 0 .4rem 0 }
"""

_READING = """
<h2>How to read this</h2>
<dl>
<dt>PCK@2</dt><dd>Share of points that a layer finds again within two patches of the truth. Compare it with the "same
position" guess, which needs no eyes, and look at the points that moved, where that guess is always wrong.
The table tells the best layer; "mean" is over layers.</dd>
<dt>Features</dt><dd><em>head</em>: the correspondence heads. <em>qk</em>: query and key states of the attention.
<em>hidden</em>: the states after each decoder layer.</dd>
<dt>ρ</dt><dd>Correlation between how sure the layer is of a match and whether it is right: 0 is no idea,
1 is perfect self-knowledge. A dash: not defined.</dd>
<dt>How long a match holds</dt><dd>PCK@2 between frames further and further apart, relative to neighbouring frames; the
legend tells what 1 stands for. Who finds next to nothing has nothing to lose: compare curves that begin alike.</dd>
</dl>
"""


def _write_page(folder: Path, title: str, parts: Sequence[str]) -> Path:
    body = "\n".join(parts)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n{_READING}</body></html>\n"
    )
    path = folder / "index.html"
    write_atomically(path, page.encode())
    return path


def _facts(report: Report) -> str:
    heads = {"trained": "trained", "initial": "untrained, made from W_Q", None: "none"}[report["heads"]]
    text = (
        f"{report['sequences']} sequences of {report['frames']} frames from {len(report['scenes'])} scenes, "
        f"{report['questions']:,} questions, {report['grid']} × {report['grid']} points. Correspondence heads: {heads}."
    )
    return f"<p>{html.escape(text)}</p>"


def _table(reports: Mapping[str, Report], kinds: Sequence[str] | None = None) -> str:
    head, *rows = table_rows(reports, kinds)
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{cells}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _image(caption: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'

"""Writes an evaluation as `report.json`, figures and one page; compares several reports.

Files are written atomically. The page contains its pictures, so it can be sent as one file.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gasp_fast.files import one_line, read_json, replacing, write_atomically

from .figures import KIND_NAMES, draw_figure
from .paired import Difference, as_json, difference_rows, paired_differences
from .report_check import check_report
from .tables import FOUND, FURTHER, Report, definitions, group_rows, html_rows, html_table, pck_name

Picture = tuple[str, Path]  # caption, PNG
# Two reports that differ in one of these were not evaluated alike.
COMPARABLE = ("frames", "grid", "scenes", "settings", "token grids", "unreadable sequences")
NAMED_ELSEWHERE = ("direction", "frame_pixels")  # settings that show in the names of features and in the token grids
MOST_WARNINGS = 20  # of scenes and sequences that cannot be read
MOST_GRIDS = 3  # sizes of token grids that are shown


@dataclass(frozen=True)
class Comparison:
    """A written comparison of reports."""

    page: Path
    differences: list[Difference]  # of each report from the first, on the sequences that both have
    warnings: list[str]  # for each report that was made on other data or settings than the first


def write_report(report: Report, folder: Path, pictures: Sequence[Picture] = ()) -> Path:
    """Writes `report.json`, a figure for each kind of features and `index.html`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    name = str(report["model"])
    figures = [_figure({name: report}, kind, folder / f"figure-{kind}.png") for kind in report["by_features"]]
    parts = [_overview(report), html_table({name: report}), *map(_image, figures), *_group_tables({name: report})]
    if pictures:
        parts += ["<h2>Example sequences</h2>", *map(_image, pictures)]
    return _write_page(folder, f"Correspondence evaluation: {name}", parts, {name: report})


def read_report(path: Path, whole: bool = False) -> dict[str, Any]:
    """Reads a `report.json`, from the file, its folder, or a run (`report/`).

    `whole` checks all that a comparison reads of it.
    """
    candidates = [path, path / "report.json", path / "report" / "report.json"]
    file = next((one for one in candidates if one.is_file()), None)
    if file is None:
        raise OSError(f"{path}: no report.json here; make one with gasp-fast evaluate")
    report: dict[str, Any] = read_json(file)
    try:
        _ = report["model"], report["by_features"][report["features"]]["pck"]["per_layer"]
        if whole:
            check_report(report)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a report of gasp-fast evaluate ({one_line(error)})") from error
    return report


def left_out(report: Report) -> list[int]:
    """The sequences that could not be read. Reports of earlier versions have none."""
    return [one["sequence"] for one in report.get("unreadable", {}).get("sequences", [])]


def write_comparison(
    reports: Mapping[str, Report],
    folder: Path,
    pictures: Sequence[Picture] = (),
    title: str | None = None,
    introduction: str = "",
) -> Comparison:
    """Writes several reports as one page, with a figure for each kind of features that all of them have.

    `reports` are named as in the legends; `introduction` is HTML below the `title`.
    """
    pck_name(reports)  # raises if it is not the same metric
    kinds = [kind for kind in KIND_NAMES if all(kind in report["by_features"] for report in reports.values())]
    if not kinds:
        present = "; ".join(f"{name}: {', '.join(report['by_features'])}" for name, report in reports.items())
        raise ValueError(f"the reports share no kind of features ({present}); evaluate with the same --features")
    folder.mkdir(parents=True, exist_ok=True)
    differences, unpaired = paired_differences(reports, kinds)
    warnings = [*_other_settings(reports), *unpaired]
    figures = [_figure(reports, kind, folder / f"compare-{kind}.png") for kind in kinds]
    content = {"kinds": kinds, "differences": as_json(differences), "reports": reports}
    write_atomically(folder / "compare.json", (json.dumps(content, indent=1) + "\n").encode())
    parts = [introduction, *(f"<p class=warn>{html.escape(warning)}</p>" for warning in warnings)]
    parts.append(html_table(reports, kinds))
    if differences:
        parts += ["<h2>Differences on the same sequences</h2>", html_rows(difference_rows(differences, reports))]
    parts += map(_image, [*pictures[:1], *figures, *pictures[1:]])
    page = _write_page(folder, title or "Comparison: " + ", ".join(reports), parts, reports)
    return Comparison(page, differences, warnings)


def _other_settings(reports: Mapping[str, Report]) -> list[str]:
    first_name, first = next(iter(reports.items()))
    return [
        f"{name} and {first_name} were evaluated with different {field}: their numbers are not strictly comparable"
        for name, report in reports.items()
        for field in COMPARABLE
        if _compared(report, first)[field] != _compared(first, report)[field]
    ]


def _compared(report: Report, other: Report) -> dict[str, Any]:
    """What must be equal in two reports, as far as both have it."""
    settings = {
        name: value
        for name, value in report.get("settings", {}).items()
        if name in other.get("settings", {}) and name not in NAMED_ELSEWHERE
    }
    grids = report.get("token_grids", []) if "token_grids" in other else []
    return {
        **{field: report.get(field) for field in COMPARABLE},
        "settings": settings,
        "token grids": {(grid["rows"], grid["columns"]) for grid in grids},
        "unreadable sequences": left_out(report),
    }


def _group_tables(reports: Mapping[str, Report]) -> list[str]:
    """PCK of each head group, of the features that have them."""
    return [
        f"<h2>{pck_name(reports)} by head group: {KIND_NAMES[kind]}</h2>\n{html_rows(group_rows(metrics))}"
        for report in reports.values()
        for kind, metrics in report["by_features"].items()
        if "pck_groups" in metrics
    ]


def _figure(reports: Mapping[str, Report], kind: str, path: Path) -> Picture:
    with replacing(path) as partial:
        draw_figure(reports, kind, partial)
    return KIND_NAMES[kind].capitalize(), path


# ---- the page -------------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 15px; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
figure { margin: 2rem 0 } img { max-width: 100%; height: auto } figcaption { color: #555 }
.warn { background: #fff3cd; padding: .5rem 1rem } dt { font-weight: 600 } dd { margin: 0 0 .4rem 0 }
"""

_DEFINITIONS = {
    **FOUND,
    **FURTHER,
    "features": "what is matched: head, the embeddings of the correspondence heads; qk, the attention's queries and "
    "keys; hidden, the hidden states after each decoder layer; causal, a point of a later frame is looked for in the "
    "first one",
    "ρ": "Pearson correlation of the confidence of a prediction (its matching probability) and whether it is correct: "
    "0 means unrelated, 1 means that confidence separates correct from wrong; a dash: undefined",
    "{pck} by temporal gap": "relative to the {pck} of neighbouring frames, which the legend gives; compare curves "
    "whose {pck} at gap 1 is similar, since a model near zero has little to lose",
}


def _write_page(folder: Path, title: str, parts: Sequence[str], reports: Mapping[str, Report]) -> Path:
    terms = definitions(reports, _DEFINITIONS).items()
    listed = "".join(f"<dt>{term}</dt><dd>{html.escape(text)}.</dd>\n" for term, text in terms)
    body = "\n".join([*parts, f"<h2>Definitions</h2>\n<dl>\n{listed}</dl>"])
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )
    path = folder / "index.html"
    write_atomically(path, page.encode())
    return path


def _overview(report: Report) -> str:
    heads = {"trained": "trained", "initial": "untrained, initialised from W_Q", None: "none"}[report["heads"]]
    text = (
        f"{report['sequences']} sequences of {report['frames']} frames from {len(report['scenes'])} scenes, "
        f"{report['grid']} × {report['grid']} query points, {report['questions']:,} correspondences. "
        f"{token_grids(report)} Correspondence heads: {heads}."
    )
    if report["settings"]["confidence"] == "attention":
        text += " Confidence of queries and keys: the probability that attention gives to the prediction."
    warnings = [f"<p class=warn>{html.escape(warning)}</p>" for warning in warnings_of(report)]
    return "\n".join([f"<p>{html.escape(text)}</p>", *warnings])


def token_grids(report: Report) -> str:
    """The rows and columns of the frames' tokens, in words."""
    grids = [f"{grid['rows']} × {grid['columns']}" for grid in report["token_grids"]]
    more = f" and {len(grids) - MOST_GRIDS} other sizes" if len(grids) > MOST_GRIDS else ""
    return f"Tokens of a frame: {', '.join(grids[:MOST_GRIDS])}{more} (rows × columns)."


def warnings_of(report: Report) -> list[str]:
    """What an evaluation left out, in words."""
    unreadable = report["unreadable"]
    warnings = [f"scene {name} cannot be read and is left out: {why}" for name, why in unreadable["scenes"].items()]
    warnings += [
        f"sequence {one['sequence']} of scene {one['scene']} cannot be read and is left out: {one['reason']}"
        for one in unreadable["sequences"]
    ]
    if len(warnings) > MOST_WARNINGS:
        warnings[MOST_WARNINGS:] = [f"{len(warnings) - MOST_WARNINGS} more are named in report.json"]
    if warnings:
        counts = [len(unreadable[what]) for what in ("scenes", "sequences")]
        warnings.insert(0, "unreadable scenes: {}, unreadable sequences: {}".format(*counts))
    for kind, metrics in report["by_features"].items():
        layers = [n for n, pck in zip(metrics["layers"], metrics["pck"]["per_layer"], strict=True) if pck is None]
        if layers:
            names = ", ".join(map(str, layers))
            warnings.append(f"{kind}: the features of layers {names} are NaN or infinite; their metrics are undefined")
    return warnings


def _image(picture: Picture) -> str:
    caption, path = picture
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'

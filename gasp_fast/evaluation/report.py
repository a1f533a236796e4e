"""Writes an evaluation as `report.json`, figures and one page; compares several reports.

Files are written atomically. A page contains all that it shows, so it can be sent as one file; its links lead to other
files of the same project.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gasp_fast.drawing import as_svg, save_figure
from gasp_fast.files import one_line, read_json, write_atomically

from .figures import draw_figure
from .page import Link, folded, links, picture, plot, pointing_part, write_page
from .paired import Difference, as_json, difference_rows, paired_differences, shared_digests
from .pointing_page import FILE as POINTING
from .pointing_page import page_data, read_pointing
from .report_check import check_report
from .tables import FOUND, FURTHER, KIND_NAMES, Report, bars, definitions, group_rows, html_rows, html_tables, pck_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture = tuple[str, Path]  # caption, PNG
# Two reports that differ in one of these were not evaluated alike.
COMPARABLE = ("frames", "grid", "scenes", "scene contents", "settings", "token grids", "unreadable sequences")
NAMED_ELSEWHERE = ("direction", "frame_pixels")  # settings that show in the names of features and in the token grids
MOST_WARNINGS = 20  # of scenes and sequences that cannot be read
MOST_GRIDS = 3  # sizes of token grids that are shown
PAGE = "index.html"


@dataclass(frozen=True)
class Comparison:
    """A written comparison of reports."""

    page: Path
    differences: list[Difference]  # of each report from the first, on the sequences that both have
    warnings: list[str]  # what is not compared, and which reports were made on other data or settings than the first


def write_report(
    report: Report, folder: Path, pointing: Mapping[str, Any] | None = None, related: Sequence[Link] = ()
) -> Path:
    """Writes `report.json`, a figure for each kind of features, `pointing.json` and `index.html`; returns the page.

    `related` files are linked where they exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    if pointing is None:
        (folder / POINTING).unlink(missing_ok=True)
    else:
        write_atomically(folder / POINTING, (json.dumps(pointing, allow_nan=False) + "\n").encode())
    reports = {str(report["model"]): report}
    parts = [
        links([*related, ("the numbers: report.json", folder / "report.json")], folder),
        _overview(report),
        *bars(reports),
        *_figures(reports, list(report["by_features"]), folder, "figure"),
        _pointing(reports, {name: pointing for name in reports if pointing is not None}),
        "<h2>All numbers</h2>",
        *html_tables(reports),
        *_group_tables(reports),
        _definitions(reports),
    ]
    return write_page(folder / PAGE, f"Correspondence evaluation: {report['model']}", parts)


def find_report(path: Path) -> Path:
    """The `report.json` of a file, of its folder, or of a run (`report/`)."""
    candidates = [path, path / "report.json", path / "report" / "report.json"]
    file = next((one for one in candidates if one.is_file()), None)
    if file is None:
        raise OSError(f"{path}: no report.json here; make one with gasp-fast evaluate")
    return file


def read_report(path: Path, whole: bool = False) -> dict[str, Any]:
    """Reads a `report.json`, from the file, its folder, or a run.

    `whole` checks all that a comparison reads of it.
    """
    file = find_report(path)
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
    *,
    sources: Mapping[str, Path] | None = None,
    curves: Figure | None = None,
) -> Comparison:
    """Writes several reports as one page, with a figure for each kind of features that all of them have.

    `reports` are named as in the legends; `introduction` is HTML below the `title`. `sources` are the reports' files or
    folders: they have what the page points at, and the page links to theirs. `curves` are of the training runs.
    """
    pck_name(reports)  # raises if it is not the same metric
    kinds = [kind for kind in KIND_NAMES if all(kind in report["by_features"] for report in reports.values())]
    if not kinds:
        present = "; ".join(f"{name}: {', '.join(report['by_features'])}" for name, report in reports.items())
        raise ValueError(f"the reports share no kind of features ({present}); evaluate with the same --features")
    files = {name: find_report(path) for name, path in (sources or {}).items()}
    read = {name: read_pointing(file.parent) for name, file in files.items()}
    folder.mkdir(parents=True, exist_ok=True)
    differences, unpaired = paired_differences(reports, kinds)
    warnings = [*_other_features(reports, kinds), *_other_settings(reports), *unpaired]
    content = {"kinds": kinds, "differences": as_json(differences), "reports": reports}
    write_atomically(folder / "compare.json", (json.dumps(content, indent=1) + "\n").encode())
    parts = [
        links([(f"report: {name}", file.parent / PAGE) for name, file in files.items()], folder),
        introduction,
        *(f'<p class="warn">{html.escape(warning)}</p>' for warning in warnings),
        *bars(reports, kinds),
        *_figures(reports, kinds, folder, "compare"),
        _pointing(reports, {name: one for name, one in read.items() if one is not None}),
        "<h2>All numbers</h2>",
        *html_tables(reports, kinds),
    ]
    if differences:
        parts += ["<h2>Differences on the same sequences</h2>", html_rows(difference_rows(differences, reports))]
    if curves is not None:
        save_figure(curves, folder / "training.png")
        parts += ["<h2>Training</h2>", plot("Curves of the training runs", as_svg(curves))]
    parts += [*(picture(*one) for one in pictures), _definitions(reports)]
    page = write_page(folder / PAGE, title or "Comparison: " + ", ".join(reports), parts)
    return Comparison(page, differences, warnings)


def _other_features(reports: Mapping[str, Report], kinds: Sequence[str]) -> list[str]:
    """A line for the features that only some reports have."""
    owners: dict[str, list[str]] = {}
    for name, report in reports.items():
        for kind in report["by_features"]:
            if kind not in kinds:
                owners.setdefault(kind, []).append(name)
    left_out = "; ".join(f"{kind}, which only {' and '.join(names)} measured" for kind, names in owners.items())
    return [f"compared by {', '.join(kinds)}, left out: {left_out}"] if left_out else []


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
        "scene contents": shared_digests(report, other),
        "settings": settings,
        "token grids": {(grid["rows"], grid["columns"]) for grid in grids},
        "unreadable sequences": left_out(report),
    }


# ---- parts of the page ----------------------------------------------------------------------------------------------

_DEFINITIONS = {
    **FOUND,
    **FURTHER,
    "features": "what is matched: head, the embeddings of the correspondence heads; qk, the attention's queries and "
    "keys; hidden, the hidden states after each decoder layer; causal, a point of a later frame is looked for in the "
    "first one",
    "ρ": "Pearson correlation of the confidence of a prediction (its matching probability) and whether it is correct: "
    "0 means unrelated, 1 means that confidence separates correct from wrong; a dash: undefined",
    "{pck} by temporal gap": "of the best layer; also relative to the {pck} of neighbouring frames, where a model that "
    "finds nothing has little to lose and a flat curve",
}


def _figures(reports: Mapping[str, Report], kinds: Sequence[str], folder: Path, prefix: str) -> list[str]:
    """A figure for each kind of features, as PNG file and in the page, where all but the first are folded."""
    leading = next(iter(reports.values()))["features"]
    parts: list[str] = []
    for kind in sorted(kinds, key=lambda kind: kind != leading):
        figure = draw_figure(reports, kind)
        save_figure(figure, folder / f"{prefix}-{kind}.png")
        part = plot("Curves: means over sequences; shades: their standard deviation.", as_svg(figure))
        parts.append(folded(f"Figure of the {KIND_NAMES[kind]}", part) if parts else part)
    return parts


def _pointing(reports: Mapping[str, Report], pointings: Mapping[str, Any]) -> str:
    data, note = page_data(reports, pointings)
    parts = [] if data is None else [pointing_part(data)]
    return "\n".join([*parts, *([f'<p class="note">{html.escape(note)}</p>'] if note else [])])


def _definitions(reports: Mapping[str, Report]) -> str:
    terms = definitions(reports, _DEFINITIONS).items()
    listed = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}.</dd>\n" for term, text in terms)
    return f"<h2>Definitions</h2>\n<dl>\n{listed}</dl>"


def _group_tables(reports: Mapping[str, Report]) -> list[str]:
    """PCK of each head group, of the features that have them."""
    return [
        folded(f"{pck_name(reports)} by head group: {KIND_NAMES[kind]}", html_rows(group_rows(metrics)))
        for report in reports.values()
        for kind, metrics in report["by_features"].items()
        if "pck_groups" in metrics
    ]


def _overview(report: Report) -> str:
    heads = {"trained": "trained", "initial": "untrained, initialised from W_Q", None: "none"}[report["heads"]]
    text = (
        f"{report['sequences']} sequences of {report['frames']} frames from {len(report['scenes'])} scenes, "
        f"{report['grid']} × {report['grid']} query points, {report['questions']:,} correspondences. "
        f"{token_grids(report)} Correspondence heads: {heads}."
    )
    if report["settings"]["confidence"] == "attention":
        text += " Confidence of queries and keys: the probability that attention gives to the prediction."
    warnings = [f'<p class="warn">{html.escape(warning)}</p>' for warning in warnings_of(report)]
    return "\n".join([f"<p>{html.escape(text)}</p>", *warnings])


def token_grids(report: Report) -> str:
    """The rows and columns of the frames' tokens, in words."""
    grids = [f"{grid['rows']} × {grid['columns']}" for grid in report["token_grids"]]
    more = f" and {len(grids) - MOST_GRIDS} other sizes" if len(grids) > MOST_GRIDS else ""
    return f"Tokens of a frame: {', '.join(grids[:MOST_GRIDS])}{more} (rows × columns)."


def warnings_of(report: Report) -> list[str]:
    """What an evaluation left out, in words."""
    unreadable = report["unreadable"]
    warnings = [f"scene {name} cannot be used and is left out: {why}" for name, why in unreadable["scenes"].items()]
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

"""Several results side by side: the change against the base for each benchmark, and PCK beside benchmark means.

The heat map is the paper's Figure 4, the generalisation gap: models by benchmarks. The ablation table is its Table 4:
the PCK of each run's report and, for each benchmark, the mean of its categories. The plot shows PCK against the mean of
these means; a model is on the Pareto front if none has more of both.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from gasp_fast.drawing import as_svg, save_figure
from gasp_fast.evaluation.page import Link, links, plot, write_page
from gasp_fast.evaluation.report import read_report
from gasp_fast.evaluation.tables import html_rows
from gasp_fast.files import write_atomically
from gasp_fast.run_folder import REPORT, run_of

from .comparison_figures import draw_gap, draw_pareto
from .results import RESULTS, read_results
from .tables import PAGE, percent, signed

IN_RUN = "benchmarks"  # the folder of a run in which its results are found
Rows = list[list[str]]


@dataclass(frozen=True)
class Model:
    """What is compared of one model. Benchmarks are named by their titles."""

    name: str
    page: Path
    means: dict[str, float]  # mean of the categories
    changes: dict[str, float]  # model minus base
    pck: float | None  # of the best layer; None: there is no report

    @property
    def mean(self) -> float:
        return mean(self.means.values())


def find_results(paths: Sequence[Path]) -> list[Path]:
    """The folders of results: each path itself, its `benchmarks/`, or else all folders in it that have results."""
    found: list[Path] = []
    for path in paths:
        own = next((folder for folder in (path, path / IN_RUN) if (folder / RESULTS).is_file()), None)
        inside = [file.parent for pattern in ("*", f"*/{IN_RUN}") for file in path.glob(f"{pattern}/{RESULTS}")]
        if own is None and not inside:
            raise OSError(f"{path}: no {RESULTS} here; make one with gasp-fast benchmark")
        found += [own] if own is not None else sorted(inside)
    return found


def read_models(folders: Sequence[Path], names: Sequence[str] | None = None) -> list[Model]:
    """The benchmarks that all have; their names are those of the folders, or of the runs."""
    contents = [read_results(folder) for folder in folders]
    rows = [{row["title"]: row for row in content["benchmarks"]} for content in contents]
    shared = [title for title in rows[0] if all(title in one for one in rows)]
    if not shared:
        raise ValueError("the results share no benchmark; run gasp-fast benchmark with the same --suite")
    _check_alike(folders, contents, rows, shared)
    names = names or [folder.resolve().parent.name if folder.name == IN_RUN else folder.name for folder in folders]
    if len(names) != len(folders) or len(set(names)) < len(names):
        raise ValueError(f"--names: give {len(folders)} different names; these are {', '.join(names)}")
    return [
        Model(
            name,
            folder / PAGE,
            {title: mean(one[title]["model"]["categories"].values()) for title in shared},
            {title: one[title]["difference"]["mean"] for title in shared if "difference" in one[title]},
            _pck(folder, content),
        )
        for name, folder, content, one in zip(names, folders, contents, rows, strict=True)
    ]


def _check_alike(
    folders: Sequence[Path], contents: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], shared: list[str]
) -> None:
    for folder, content, one in zip(folders, contents, rows, strict=True):
        for title in shared:
            for key in ("questions", "frames"):
                if one[title][key] != rows[0][title][key]:
                    raise ValueError(
                        f"{folder}: {title} has {key} = {one[title][key]}, but {rows[0][title][key]} in {folders[0]}; "
                        "only scores that were measured alike can be compared"
                    )
        if content["limit"] != contents[0]["limit"]:
            raise ValueError(f"{folder}: --limit {content['limit']}, but {contents[0]['limit']} in {folders[0]}")


def _pck(folder: Path, content: Mapping[str, Any]) -> float | None:
    run = folder.parent if folder.name == IN_RUN else run_of(content["model"])
    if run is None or not (run / REPORT / "report.json").is_file():
        return None
    report = read_report(run / REPORT)
    return float(report["by_features"][report["features"]]["pck"]["peak"])


def pareto_front(models: Sequence[Model]) -> list[str]:
    """The names of the models with a PCK that no other exceeds in PCK or mean without falling behind in the other."""
    points = {model.name: (model.pck, model.mean) for model in models if model.pck is not None}
    return [
        name
        for name, (pck, whole) in points.items()
        if not any(a >= pck and b >= whole and (a, b) != (pck, whole) for a, b in points.values())
    ]


def gap_rows(models: Sequence[Model]) -> Rows:
    titles = list(models[0].means)
    rows = [["model", *titles]]
    return rows + [[one.name, *(signed(one.changes.get(title)) for title in titles)] for one in models]


def ablation_rows(models: Sequence[Model]) -> Rows:
    titles, front = list(models[0].means), pareto_front(models)
    rows = [["model", "PCK", *titles, "mean", "Pareto front"]]
    for one in models:
        pck = "–" if one.pck is None else f"{one.pck:.3f}"
        means = [percent(one.means[title]) for title in titles]
        rows.append([one.name, pck, *means, percent(one.mean), "yes" if one.name in front else ""])
    return rows


def by_benchmark(rows: Rows) -> Rows:
    """A column for each model instead of a row: a terminal has no room for a column for each benchmark."""
    turned = [list(column) for column in zip(*rows, strict=True)]
    return [["", *turned[0][1:]], *turned[1:]]


def write_comparison(models: Sequence[Model], out: Path) -> Path:
    """Writes comparison.json, the figures and index.html; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    content = {"pareto_front": pareto_front(models), "models": [asdict(one) | {"mean": one.mean} for one in models]}
    write_atomically(out / "comparison.json", (json.dumps(content, indent=1, default=str) + "\n").encode())
    targets: list[Link] = [(f"benchmarks: {one.name}", one.page) for one in models]
    parts = [links(targets, out)]
    changed = [one for one in models if one.changes]
    if changed:
        figure = draw_gap([one.name for one in changed], list(models[0].means), [one.changes for one in changed])
        save_figure(figure, out / "gap.png")
        parts += ["<h2>Change against the base</h2>", plot("Percentage points, model minus base", as_svg(figure))]
        parts.append(html_rows(gap_rows(changed)))
    parts += ["<h2>PCK and benchmarks</h2>", html_rows(ablation_rows(models))]
    parts.append(f'<p class="note">{html.escape(MEANS)}</p>')
    with_pck = [one for one in models if one.pck is not None]
    if with_pck:
        points = {one.name: (one.pck or 0.0, one.mean) for one in with_pck}
        figure = draw_pareto(points, pareto_front(models))
        save_figure(figure, out / "pareto.png")
        parts.append(plot("PCK of the best layer against the mean over benchmarks", as_svg(figure)))
    return write_page(out / PAGE, "Benchmarks: " + ", ".join(one.name for one in models), parts)


MEANS = (
    "A benchmark's column is the mean of its categories, as in the paper's Table 4; its official score may be another. "
    "PCK is that of the best layer in the run's report; a dash: the run has none. A model is on the Pareto front if no "
    "other is better in PCK or mean and at least as good in the other."
)

"""Tables of results: in the terminal, as Markdown, and in a page.

As in the paper's Tables 1 to 3, a row is a model and a column a category of a benchmark. Numbers are percent.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from gasp_fast.evaluation.page import folded, links, write_page
from gasp_fast.evaluation.tables import html_rows, terminal_rows
from gasp_fast.files import write_atomically

Results = Mapping[str, Any]
Rows = list[list[str]]
TABLES, PAGE = "tables.md", "index.html"
BIAS = "Bias: average sizes in the prompt"
PAPER = "paper (base)"
ABOUT_PAPER = (
    "The paper: scores of the same backbone that readers of it have published in notes; its tables were not at hand. "
    "Its base is fine-tuned on the same questions without geometry; here the base is the model before training. How "
    "many frames were seen is not known. Only what was measured alike can be compared."
)
INTERVAL = (
    "Difference: model minus base, with the 95 % interval of lmms-eval's paired t-test over the questions that both "
    "answered."
)


def write_tables(results: Results, out: Path) -> Path:
    """Writes tables.md and index.html; returns the page."""
    write_atomically(out / TABLES, markdown(results).encode())
    parts = [links([("the numbers: results.json", out / "results.json"), ("the tables: tables.md", out / TABLES)], out)]
    parts += [f'<p class="warn">{html.escape(line)}</p>' for line in results["left_out"]]
    parts += ["<h2>All benchmarks</h2>", html_rows(overview(results))]
    parts += [f'<p class="note">{html.escape(text)}</p>' for text in explanations(results)]
    if bias := bias_rows(results):
        parts += [f"<h2>{BIAS}</h2>", html_rows(bias)]
    for row in results["benchmarks"]:
        parts += [f"<h2>{html.escape(row['title'])}</h2>", html_rows(by_category(results, row))]
        parts += [f'<p class="note">{html.escape(text)}</p>' for text in row_notes(row)]
    tasks = [[row["title"], ", ".join(row["tasks"])] for row in results["benchmarks"]]
    parts.append(folded("Tasks of lmms-eval", html_rows([["benchmark", "tasks"], *tasks])))
    return write_page(out / PAGE, f"Benchmarks: {label(results['model'])}", parts)


def markdown(results: Results) -> str:
    lines = [
        f"# Benchmarks: {label(results['model'])}",
        "",
        *results["left_out"],
        *([""] if results["left_out"] else []),
    ]
    lines += [*_markdown_rows(overview(results)), ""]
    lines += [part for text in explanations(results) for part in (text, "")]
    if bias := bias_rows(results):
        lines += [f"## {BIAS}", "", *_markdown_rows(bias), ""]
    for row in results["benchmarks"]:
        lines += [f"## {row['title']}", "", *_markdown_rows(by_category(results, row)), ""]
        lines += [part for text in row_notes(row) for part in (text, "")]
    return "\n".join(lines)


def overview(results: Results) -> Rows:
    """A row for each benchmark, below a row of headings."""
    headings = ["benchmark", "questions", *(["base"] if "base" in results else []), "model"]
    headings += ["difference", "95 % interval"] if "base" in results else []
    paper = any("" in row.get("paper", {}) for row in results["benchmarks"])
    rows = [headings + ([PAPER] if paper else [])]
    for row in results["benchmarks"]:
        cells = [row["title"], questions(row)]
        cells += [percent(row[role]["score"]) for role in ("base", "model") if role in results]
        if "base" in results:
            cells += [signed(row["difference"]["mean"]), interval(row["difference"])]
        rows.append([*cells, in_paper(row.get("paper", {}).get(""))] if paper else cells)
    return rows


def in_paper(scores: Sequence[float] | None) -> str:
    """Published scores, which are percent: with GASP, and before it."""
    return "" if scores is None else f"{scores[1]:.1f} ({scores[0]:.1f})"


def terminal_table(results: Results) -> Table:
    return terminal_rows(overview(results), {}, ("benchmark", PAPER))


def by_category(results: Results, row: Mapping[str, Any]) -> Rows:
    """A row for each model, one for the difference, and one for what is known of the paper's."""
    roles = [role for role in ("base", "model") if role in results]
    names = sorted({name for role in roles for name in row[role]["categories"]})
    rows = [["", "score", *map(readable, names)]]
    for role in roles:
        found = row[role]
        rows.append([role, percent(found["score"]), *(percent(found["categories"].get(name)) for name in names)])
    if "base" in roles:
        ours, base = row["model"]["categories"], row["base"]["categories"]
        changes = [ours[name] - base[name] if name in ours and name in base else None for name in names]
        rows.append(["difference", signed(row["difference"]["mean"]), *map(signed, changes)])
    if paper := row.get("paper"):
        rows.append([PAPER, *(in_paper(paper.get(name)) for name in ("", *names))])
    return rows


def bias_rows(results: Results) -> Rows:
    """VSI-Bench with and without average sizes in the prompt, as in the paper's Table 5; empty if one is missing."""
    found = {row["key"]: row for row in results["benchmarks"]}
    if not {"vsibench", "vsibench_prior"} <= found.keys():
        return []
    rows: Rows = []
    for role in (role for role in ("base", "model") if role in results):
        without, given = found["vsibench"][role], found["vsibench_prior"][role]
        names = sorted(without["categories"].keys() & given["categories"].keys())
        pairs = [(without["score"], given["score"])]
        pairs += [(without["categories"][name], given["categories"][name]) for name in names]
        rows = rows or [["", "score", *map(readable, names)]]
        rows.append([f"{role}, without", *(percent(first) for first, _ in pairs)])
        rows.append([f"{role}, with sizes", *(percent(second) for _, second in pairs)])
        rows.append([f"{role}, change", *(signed(second - first) for first, second in pairs)])
    return rows


def explanations(results: Results) -> list[str]:
    base = f" Base: {label(results['base'])}." if "base" in results else ""
    texts = [f"Model: {label(results['model'])}.{base} Percent, by lmms-eval {results['lmms_eval']}."]
    if results["limit"] is not None:
        texts.append(f"Only the first {results['limit']:,} questions of each task: a trial, not a result.")
    texts += [INTERVAL] if "base" in results else []
    return texts + ([ABOUT_PAPER] if any(row.get("paper") for row in results["benchmarks"]) else [])


def row_notes(row: Mapping[str, Any]) -> list[str]:
    notes = [f"{questions(row)} questions; {seen(row)}. {' '.join(row['notes'])}".strip()]
    undecided = {role: row[role]["undecided"] for role in ("base", "model") if "undecided" in row.get(role, {})}
    if undecided:
        counts = ", ".join(f"{count:,} of the {role}" for role, count in undecided.items())
        notes.append(f"Answers that no rule could read, which count as wrong: {counts}.")
    return notes


def label(folder: str) -> str:
    """The last two parts of a path: a run and its export."""
    return "/".join(Path(folder).parts[-2:])


def questions(row: Mapping[str, Any]) -> str:
    return f"{row['questions']:,}" if row["questions"] == row["of"] else f"{row['questions']:,} of {row['of']:,}"


def seen(row: Mapping[str, Any]) -> str:
    pixels = f"at most {row['pixels']:,} pixels" if row["pixels"] else "the processor's own size"
    return f"{row['frames']} frames, {pixels}" if row["frames"] else pixels


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def signed(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:+.1f}"


def interval(difference: Mapping[str, Any]) -> str:
    low, high = difference["low"], difference["high"]
    return "–" if low is None else f"{signed(low)} to {signed(high)}"


def readable(name: str) -> str:
    return name.removeprefix("blink_").removeprefix("tempcompass_offline_").replace("_", " ")


def _markdown_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]

"""results.json: the scores of a model and its base, their difference, and what they saw."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gasp_fast.files import read_json, write_atomically

from .answers import HUB, Settings, Subject, answer_file, run_in_environment
from .environment import VERSION
from .paper import published
from .scores import Judged, categories, check_against_lmms_eval, judged, paired, score
from .suites import Benchmark

RESULTS = "results.json"
Answers = dict[str, list[Judged]]  # by the benchmark's key


def collect(
    roles: Mapping[str, Subject],
    benchmarks: Sequence[Benchmark],
    settings: Settings,
    left_out: Sequence[str],
    python: Path,
    data: Path,
    out: Path,
) -> dict[str, Any]:
    """The content of results.json, which it also writes. `roles` are `model`, and maybe `base`."""
    answers = {role: {one.key: _read(one, role, out) for one in benchmarks} for role in roles}
    tests = _differences(answers, benchmarks, python, data, out) if "base" in roles else {}
    rows = []
    for one in benchmarks:
        seen = settings.of(one, roles["model"].kind)
        row: dict[str, Any] = {"key": one.key, "title": one.title, "tasks": one.tasks, **seen, "notes": list(one.notes)}
        row["questions"], row["of"] = len(answers["model"][one.key]), _total(one, out)
        for role in roles:
            found = answers[role][one.key]
            row[role] = {"score": score(found), "categories": categories(found), **_extra(one, role, out)}
        row["paper"] = published(roles["model"].kind, one.key, row["model"]["categories"])
        if one.key in tests:
            row["difference"] = tests[one.key]
        rows.append(row)
    names = {role: str(who.folder) for role, who in roles.items()}
    content = {**names, "lmms_eval": VERSION, "limit": settings.limit, "benchmarks": rows, "left_out": list(left_out)}
    write_atomically(out / RESULTS, (json.dumps(content, indent=1) + "\n").encode())
    return content


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results.json, or of the one in a folder."""
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise OSError(f"{path}: no {RESULTS} here; make one with gasp-fast benchmark")
    content = read_json(file)
    try:
        _ = content["model"], [(row["key"], row["title"], row["model"]["score"]) for row in content["benchmarks"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: not results of gasp-fast benchmark ({error!r})") from error
    return dict(content)


def _file(out: Path, role: str, task: str) -> dict[str, Any]:
    return dict(read_json(answer_file(out, role, task)))


def _read(benchmark: Benchmark, role: str, out: Path) -> list[Judged]:
    answers: list[Judged] = []
    for task in benchmark.tasks:
        content = _file(out, role, task)
        found = judged(benchmark, task, content["samples"])
        if not found:
            raise ValueError(f"{task}: it has no questions; check that its data are complete")
        check_against_lmms_eval(benchmark, task, found, content["scores"])
        answers += found
    return answers


def _total(benchmark: Benchmark, out: Path) -> int:
    """The number of questions of the whole benchmark."""
    return benchmark.questions or sum(_file(out, "model", task)["of"] for task in benchmark.tasks)


def _extra(benchmark: Benchmark, role: str, out: Path) -> dict[str, int]:
    """Sums of further metrics over the answers."""
    files = [_file(out, role, task)["samples"] for task in benchmark.tasks]
    return {name: sum(int(one[name]) for samples in files for one in samples) for name in benchmark.extra}


def _differences(
    answers: Mapping[str, Answers], benchmarks: Sequence[Benchmark], python: Path, data: Path, out: Path
) -> dict[str, dict[str, Any]]:
    """Model minus base, with the interval of lmms-eval's paired t-test."""
    pairs = {one.key: paired(answers["model"][one.key], answers["base"][one.key]) for one in benchmarks}
    file = out / "answers" / "pairs.json"
    write_atomically(file, json.dumps(pairs).encode())
    events = run_in_environment(python, "compare", file, data, out / "answers" / "compare.log", out.absolute() / HUB)
    [event] = [event for event in events if "compared" in event]
    return {
        key: {"mean": test["mean_diff"], "low": test["ci_lower"], "high": test["ci_upper"], "p": test["p_value"]}
        | {"questions": test["n"]}
        for key, test in event["compared"].items()
    }

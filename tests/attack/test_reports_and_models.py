"""Damaged reports, logs, measurements and model folders are read as they were, or refused in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.damaged_scenes import damage_bytes, damage_json, replace_file

from gasp_fast.backbones import tiny
from gasp_fast.evaluation.evaluated_model import load_evaluated_model
from gasp_fast.evaluation.metrics import Outcomes, summary
from gasp_fast.evaluation.page import pointing_part
from gasp_fast.evaluation.pointing import NOWHERE, VERSION, packed
from gasp_fast.evaluation.pointing_page import FILE, page_data, read_pointing
from gasp_fast.evaluation.predictions import Predictions, PredictionStore
from gasp_fast.evaluation.report import read_report, write_comparison
from gasp_fast.evaluation.tables import terminal_table
from gasp_fast.planning.calibration import read_measured
from gasp_fast.planning.shapes import QWEN2_5_VL_7B
from gasp_fast.run_folder import LOG
from gasp_fast.training.log import LogFile
from gasp_fast.training.summary import summarise

TRIES = {"report": 30, "pointing": 300, "settings": 200, "measured": 300, "log": 25, "model": 40}


def write_report_file(folder: Path) -> list[Path]:
    draw = np.random.default_rng(0)
    sequences = [
        Outcomes(draw.random((2, 40)) > 0.5, draw.random((2, 40)), draw.integers(1, 4, 40), draw.random(40) > 0.5)
        for _ in range(3)
    ]
    metrics = summary(sequences, [1, 2], 4)
    metrics["pck"] |= {"chance": 0.1, "constant": 0.2}
    metrics["pck_moved"] |= {"chance": 0.1, "constant": 0.2}
    metrics |= {"most_frequent": {"per_layer": [0.1, 0.2]}, "delta_avg": {"per_layer": [0.1, 0.2], "ceiling": 0.4}}
    metrics["pck_groups"] = {"per_layer": [[0.1], [0.2]], "mean_per_layer": [0.1, 0.2], "peak": 0.2}
    settings = {"max_gap": 4, "keep": 1.0, "held_out": 0.0, "seed": 0, "rope": "before", "temperature": 0.07}
    settings["radius"] = 2.0
    report: dict[str, Any] = {"model": "m", "sequences": 3, "frames": 4, "grid": 8, "features": "qk", **metrics}
    report["token_grids"] = [{"rows": 7, "columns": 7, "frames": 12}]
    report["evaluated"] = [{"sequence": n, "scene": "a", "frames": [n, n + 1, n + 2, n + 3]} for n in range(3)]
    report |= {"questions": 120, "sequences_without_tracks": 0, "scenes": ["a"], "heads": None, "settings": settings}
    report |= {"unreadable": {"scenes": {}, "sequences": []}, "by_features": {"qk": metrics}}
    (folder / "report.json").write_text(json.dumps(report))
    return [folder / "report.json"]


def use_report(folder: Path) -> None:
    report = read_report(folder / "report.json", whole=True)
    write_comparison({"a": report, "b": report}, folder / "out")
    Console(file=StringIO()).print(terminal_table({"a": report, "b": report}))


def write_pointing(folder: Path) -> list[Path]:
    """Two sequences of two frames with 2 x 2 tokens, one layer of 3 components."""
    draw = np.random.default_rng(0)
    layer = {"scale": [0.1] * 3, "agreement": 0.9, "best": packed(np.zeros((4, 1), "<u2"))}
    layer |= {name: packed(draw.integers(-127, 128, (4, 3)).astype(np.int8)) for name in ("queries", "keys")}
    sequence = {
        "scene": "a", "frames": [0, 3], "size": [8, 8], "images": ["/9j/", "/9j/"],
        "grids": [[2, 2, 0.0, 0.0, 1.0, 1.0]] * 2, "truth": packed(np.array([[0], [3], [NOWHERE], [1]], "<u2")),
        "matches": packed(np.array([[0, 0, 0], [3, 0, 1]], "<u2")), "features": {"qk": {"1": layer, "2": layer}},
    }  # fmt: skip
    content = {"version": VERSION, "temperature": 0.07, "sequences": [sequence, {**sequence, "scene": "b"}]}
    (folder / FILE).write_text(json.dumps(content))
    return [folder / FILE]


def use_pointing(folder: Path) -> None:
    if (pointing := read_pointing(folder)) is None:  # not a file
        return
    metrics = {"qk": {"pck": {"peak_layer": 1}}}
    report = {"features": "qk", "by_features": metrics, "settings": {}}
    data, _ = page_data({"a": report, "b": report}, {"a": pointing, "b": pointing})
    if data is not None:
        pointing_part(data)


SETTINGS = {"frames": 4, "scenes": {"a": "0"}, "features": ["qk"]}


def write_settings(folder: Path) -> list[Path]:
    store = PredictionStore(folder, ["qk"])
    store.begin(SETTINGS)
    store.save(0, Predictions.empty({"qk": 2}))
    return sorted((folder / "answers").iterdir())


def use_settings(folder: Path) -> None:
    store = PredictionStore(folder, ["qk"])
    store.begin(SETTINGS)
    store.load(0)


def write_measured(folder: Path) -> list[Path]:
    case = {"name": "a step", "shape": asdict(QWEN2_5_VL_7B), "factors": {"host": 1.5, "optimiser": 1.1}}
    (folder / "step.json").write_text(json.dumps({"machine": "a", "date": "b", "cases": [case]}))
    return [folder / "step.json"]


def use_measured(folder: Path) -> None:
    assumptions, _ = read_measured(folder / "step.json", QWEN2_5_VL_7B)
    assert all(type(factor) is float for factor in assumptions.factors.values())


def write_log(folder: Path) -> list[Path]:
    record: dict[str, Any] = dict.fromkeys(("loss", "lm", "corr", "depth", "lr", "grad_norm"), 1.0)
    record |= {"corr_per_layer": [1.0] * 2, "depth_per_layer": [1.0] * 2, "pck_per_layer": [0.5] * 2}
    record |= {"tokens_per_s": 100.0, "mfu": 0.1, "peak_memory": 1}
    (folder / LOG).write_text("".join(json.dumps({"step": step, **record}) + "\n" for step in range(1, 6)))
    return [folder / LOG]


def use_log(folder: Path) -> None:
    LogFile(folder, 4)
    summarise(folder, Console(file=StringIO()), True, "")


def write_model(folder: Path) -> list[Path]:
    source = folder.parent / "model"
    if not source.exists():
        tiny.build_tiny(source, tiny.TinyConfig(hidden_size=32, frame_size=56, layers=1))
    shutil.copytree(source, folder, dirs_exist_ok=True)
    return sorted(folder.iterdir())


def use_model(folder: Path) -> None:
    load_evaluated_model(folder)


def damage_line(path: Path, draw: random.Random) -> str:
    lines = path.read_text().splitlines()
    at = draw.randrange(len(lines))
    path.write_text(lines[at])
    how = damage_json(path, draw)
    path.write_text("\n".join([*lines[:at], path.read_text(), *lines[at + 1 :]]) + "\n")
    return f"{how} in line {at}"


@pytest.mark.parametrize(
    ("name", "write", "use"),
    [
        ("report", write_report_file, use_report),
        ("pointing", write_pointing, use_pointing),
        ("settings", write_settings, use_settings),
        ("measured", write_measured, use_measured),
        ("log", write_log, use_log),
        ("model", write_model, use_model),
    ],
    ids=list(TRIES),
)
def test_damage_is_refused_in_one_line_or_does_no_harm(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    write: Callable[[Path], list[Path]],
    use: Callable[[Path], None],
) -> None:
    draw, failures, refused = random.Random(name), [], 0
    folder = tmp_path / "damaged"
    for number in range(TRIES[name]):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = draw.choice(write(folder))
        ways = [damage_bytes, damage_bytes, replace_file, *[damage_json] * (5 if path.suffix == ".json" else 0)]
        ways += [damage_line] * (5 if path.suffix == ".jsonl" else 0)
        how = f"{number} {path.name}: {draw.choice(ways)(path, draw)}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                use(folder)
        except (OSError, ValueError) as error:
            text, refused = str(error), refused + 1
            if "\n" in text or os.fspath(folder) not in text or len(text) > 1000:
                failures.append(f"{how}: {type(error).__name__}: {text[:300]}")
        except Exception as error:
            failures.append(f"{how}: {type(error).__name__}: {str(error)[:300]}")
    with capsys.disabled():
        print(f" {name}: {TRIES[name]} tries, {len(failures)} failures, {refused} refused")
    assert not failures, "\n".join(failures)
    assert refused

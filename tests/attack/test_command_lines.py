"""A mistaken command line ends in one line that names what is wrong, before any work begins; none is accepted."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest
import torch
from support.tiny_training import *  # noqa: F403 (fixtures)

from gasp_fast import cli
from gasp_fast import train as entry
from gasp_fast.training import distributed, gasp
from gasp_fast.training.config import TrainConfig

LONG = "x" * 20_000
NUMBERS = ["0", "-1", "100000000000", "1" + 20 * "0", ".nan", ".inf", "-.inf"]
ODD = [*NUMBERS, '""', "null", "[1, x]", "{a: 1}", "warp", LONG]
NEVER = {  # what a number must not be, whatever it counts
    int: {"-1", "1" + 20 * "0", ".nan", ".inf", "-.inf", '""', "[1, x]", "{a: 1}", "warp", LONG},
    float: {"-1", ".nan", ".inf", "-.inf", '""', "[1, x]", "{a: 1}", "warp", LONG},
}
MEANT = {  # exceptions
    "train.clip=.inf",  # gradients of any norm
    "data.seed=-1", "data.scenes.sequences.seed=-1",  # any number gives an order
}  # fmt: skip
OF_THE_MODEL = ("model.dtype", "model.attention", "model.liger", "lora", "heads", "loss", "train.seed", "train.mode")
KNOWN = {  # each was once accepted, or ended in a traceback; with a word of the error
    "data.workers=100000": "at most",
    "train.batch_size=1000000000": "at most 65,536",
    "lora.rank=100000000000": "at most 16,384",
    "lora.rank=1" + 20 * "0": "below 2**63",
    "heads.mid_size=1" + 20 * "0": "below 2**63",
    "heads.out_size=1" + 20 * "0": "below 2**63",
    "heads.mid_size=100000000000": "at most 65,536",
    "data.qa.frames=1" + 20 * "0": "below 2**63",
    "data.scenes.grids=[8, 1" + 20 * "0" + "]": "below 2**63",
    "train.seed=-1": "0 or more",
    "train.seed=4294967296": "at most 4,294,967,295",
    "data.qa.timeout=.inf": "at most",
    "data.collator.seed=-1": "0 or more",
    "run.timeout=1e20": "at most",
    "train.epochs=1e300": "at most",
    "heads.layers=seven": "not understood",
    "train.checkpointing=every:" + 30 * "9": "must be",
}


class Begun(BaseException):
    """The command line was accepted: the work would begin."""


def begin(*_: object, **__: object) -> Any:
    raise Begun


def numbers_of(cls: Any, above: str = "") -> dict[str, Any]:
    """The kind of each key: int, float, or None for any other."""
    kinds: dict[str, Any] = {}
    for field in fields(cls):
        hint, key = get_type_hints(cls)[field.name], f"{above}{field.name}"
        if is_dataclass(hint):
            kinds |= {key: None, **numbers_of(hint, f"{key}.")}
        else:
            kinds[key] = next((kind for kind in (int, float) if kind in (hint, *get_args(hint))), None)
    return kinds


@pytest.fixture
def started(assets, tmp_path, monkeypatch, capsys) -> Callable[[str, bool], tuple[bool, str]]:
    """Start a training run with an override, up to its model, or up to its loop: accepted?, and what was printed."""
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: {{source: {assets.models['qwen2_5_vl']}, dtype: fp32}}\n"
        f"data: {{workers: 0, scenes: {{root: {assets.scenes}, sequences: {{min_frames: 3, max_frames: 3}}}}, "
        f"qa: {{root: {assets.questions}}}}}\n"
        "train: {steps: 3, batch_size: 2}\nlora: {rank: 4}\nrun: {out: run, progress: false}\n"
    )
    monkeypatch.chdir(tmp_path)  # where run.out is made
    build = gasp.build_model
    monkeypatch.setattr(entry, "TrainingLoop", begin)
    monkeypatch.setattr(distributed, "stop_processes", lambda: None)  # there are none, and it collects garbage

    def start(override: str, with_model: bool) -> tuple[bool, str]:
        monkeypatch.setattr(gasp, "build_model", build if with_model else begin)
        try:
            status = entry.main([str(path), override])
        except Begun:
            capsys.readouterr()
            return True, ""
        printed = capsys.readouterr().err
        return False, printed if status in (1, 2) else f"exit code {status}"

    return start


def fault(printed: str, name: str, name_of_program: str) -> str | None:
    """What is wrong with an error, if anything. A launcher's or library's earlier lines are allowed."""
    lines = printed.strip().splitlines()
    if not lines or not lines[-1].startswith(name_of_program):
        return f"not an error of the program: {printed[-300:]!r}"
    if "Traceback" in printed or len(lines[-1]) > 1000:
        return f"no short line: {printed[-300:]!r}"
    return None if name in lines[-1] else f"does not name {name}: {lines[-1][:300]}"


def test_every_key_of_a_run_takes_only_what_makes_sense(started, capsys):
    torch.set_num_threads(1)
    tries, accepted, failures = 0, 0, []
    for key, kind in numbers_of(TrainConfig).items():
        for value in ODD:
            override, tries = f"{key}={value}", tries + 1
            short = override[:80]
            try:
                taken, printed = started(override, key.startswith(OF_THE_MODEL))
            except Exception as error:
                failures.append(f"{short}: {type(error).__name__}: {str(error)[:200]}")
                continue
            accepted += taken
            if taken and value in NEVER.get(kind, ()) and override not in MEANT:
                failures.append(f"{short}: accepted")
            if not taken and (what := fault(printed, key.rpartition(".")[2], "gasp_fast.train: ")):
                failures.append(f"{short}: {what}")
    with capsys.disabled():
        print(f" {tries} tries, {len(failures)} failures, {accepted} accepted")
    assert not failures, "\n".join(failures)
    assert tries > 1000 and 0 < accepted < tries / 3


@pytest.mark.parametrize(("override", "stated"), KNOWN.items(), ids=lambda text: text[:40])
def test_numbers_beyond_all_sense_are_refused_with_the_limit(started, override, stated):
    taken, printed = started(override, False)
    key = override.partition("=")[0].rpartition(".")[2]
    assert not taken and fault(printed, key, "gasp_fast.train: ") is None and stated in printed


ODD_WORDS = ["0", "-1", "100000000000", "1" + 20 * "0", "nan", "inf", "-inf", "", "[1, x]", "warp", LONG, "9" * 5000]
NOT_A_NUMBER = {"nan", "inf", "-inf", "", "[1, x]", "warp", LONG}
WORK = {  # of each command: what is replaced, so that nothing begins; and arguments that it takes
    "render": ("gasp_fast.data.synthetic.scenes.ThreadPoolExecutor", ["--out", "out"]),
    "scenes": ("gasp_fast.cli.scenes.in_processes", ["SCENES"]),
    "depth": ("gasp_fast.cli.depth.DepthRun", ["SCENES"]),
    "tracks": ("gasp_fast.data.annotations.write.prepare", ["SCENES", "--out", "out", "--min-frames", "2"]),
    "make-vqa": (
        "gasp_fast.data.annotations.read.AnnotationReader",
        ["SCENES", "--tracks", "tracks", "--model", "model", "--out", "out"],
    ),
    "recipes": ("gasp_fast.config.recipes.recipe_names", []),
    "train": ("gasp_fast.train.train", ["CONFIG"]),
    "curves": ("gasp_fast.training.curves.read_run", ["run", "--out", "curves.png"]),
    "plan": ("gasp_fast.training.workload.plan_run", ["CONFIG"]),
    "evaluate": (
        "gasp_fast.evaluation.evaluated_model.load_evaluated_model",
        ["--model", "model", "--scenes", "SCENES", "--out", "out", "--frames", "2"],
    ),
    "compare": ("gasp_fast.evaluation.report.read_report", ["before", "after", "--out", "out"]),
    "export": ("gasp_fast.export.exporter.find_checkpoint", ["run", "--out", "out"]),
    "benchmark": ("gasp_fast.downstream.answers.subjects", ["--model", "m", "--suite", "paper", "--out", "out"]),
    "compare-benchmarks": ("gasp_fast.downstream.comparison.find_results", ["results", "--out", "out"]),
    "geometry": (
        "gasp_fast.g2vlm.saved.load_geometry_model",
        ["--model", "model", "--scenes", "SCENES", "--out", "out"],
    ),
    "reconstruct": ("gasp_fast.g2vlm.saved.load_geometry_model", ["PHOTOGRAPH", "--model", "model", "--out", "out"]),
    "bench": ("gasp_fast.benchmarking.measure.run_workload", []),
    "doctor": ("gasp_fast.cli.doctor.examine", []),
    "completion": ("shtab.complete", []),
}
ANY_NUMBER = {"--seed"}


def test_every_option_of_every_command_takes_only_what_makes_sense(assets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{source: {assets.models['qwen2_5_vl']}}}\ndata: {{scenes: {{root: {assets.scenes}}}}}\n"
        "run: {out: r}\n"
    )
    photograph = min((assets.scenes / "scene-0" / "color").iterdir())
    places = {"SCENES": str(assets.scenes), "CONFIG": str(recipe), "PHOTOGRAPH": str(photograph)}
    tries, accepted, failures = 0, 0, []
    for name in cli.COMMANDS:
        target, words = WORK[name]
        module, _, attribute = target.rpartition(".")
        monkeypatch.setattr(importlib.import_module(module), attribute, begin)
        words = [places.get(word, word) for word in words]
        for action in options_of(name):
            option = next((text for text in action.option_strings if text.startswith("--")), None)
            for value in ODD_WORDS:
                line = [*words, value] if option is None else [*words, f"{option}={value}"]
                tries, short = tries + 1, f"{name} {option} {value[:40]}"
                try:
                    taken, printed = outcome([name, *line], capsys)
                except Exception as error:
                    failures.append(f"{short}: {type(error).__name__}: {str(error)[:200]}")
                    continue
                accepted += taken
                number = action.type in (int, float)
                senseless = value in NOT_A_NUMBER or (value == "-1" and option not in ANY_NUMBER)
                if taken and number and senseless:
                    failures.append(f"{short}: accepted")
                stated = option.strip("-").replace("-", "_") if number and option else ""
                printed = printed.replace("-", "_")
                if not taken and (what := fault(printed, stated, f"gasp_fast {name.replace('-', '_')}: ")):
                    failures.append(f"{short}: {what}")
    with capsys.disabled():
        print(f" {tries} tries, {len(failures)} failures, {accepted} accepted")
    assert not failures, "\n".join(failures)
    assert accepted > 50


def options_of(name: str) -> list[argparse.Action]:
    """The arguments of a command that take a value."""
    actions = cli.parser_of(name, cli.load(name))._actions
    return [action for action in actions if action.nargs != 0 and action.help is not argparse.SUPPRESS]


def outcome(line: list[str], capsys) -> tuple[bool, str]:
    try:
        status = cli.main(line)
    except Begun:
        capsys.readouterr()
        return True, ""
    except SystemExit as end:  # argparse
        status = end.code
    printed = capsys.readouterr()
    if status == 0:
        return True, ""
    return False, printed.err if status in (1, 2) else f"exit code {status}"

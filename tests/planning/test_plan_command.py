"""`gasp-fast plan`: what it prints, its exit code and its errors."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.planning import QWEN, zero

from gasp_fast.cli import plan as command
from gasp_fast.planning.shapes import QWEN2_5_VL_7B


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(QWEN), *words]))


def test_the_command_says_what_takes_most_and_compares_with_the_paper(capsys: Any) -> None:
    assert run(zero("zero1"), "--gpus", "32", "--gpu", "h200") == 0
    output = " ".join(capsys.readouterr().out.split())
    for words in ("memory fits", "the largest part is saved activations", "activations of 28 of 28 decoder layers",
                  "as by gasp-fast[gpu]", "GPU-hours", "the largest part is decoder",
                  "imply 4.6", "if the paper's 1.75 M annotations are", "frames of sequences",
                  "the paper: 320 GPU-hours", "has not been measured",
                  "to be the paper's 1,750,000 sequences"):  # fmt: skip
        assert words in output


def test_a_recipe_that_does_not_fit_says_so_and_exits_with_1(capsys: Any) -> None:
    assert run(zero("zero1"), "train.checkpointing=off", "model.liger=false", "--gpu", "h100") == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_a_measured_step_corrects_the_parts_of_the_plan(tmp_path: Path, capsys: Any) -> None:
    case = {"name": "a step", "shape": asdict(QWEN2_5_VL_7B), "factors": {"vision": 5.0, "host": 40.0}}
    path = tmp_path / "step.json"
    path.write_text(json.dumps({"machine": "NVIDIA H200", "date": "2026-01-01", "cases": [case]}))
    run(zero("zero1"))
    assumed = capsys.readouterr().out
    run(zero("zero1"), "--measured", str(path))
    output = " ".join(capsys.readouterr().out.split())
    assert "parts of a step are corrected by a step on NVIDIA H200, 2026-01-01" in output
    assert "not been measured" not in output and "idle" in output and "idle" not in assumed


def test_what_cannot_be_planned_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="does not divide over 48 processes"):
        run(zero("zero1"), "--gpus", "48")
    with pytest.raises(ValueError, match="--sequences 0"):
        run("--sequences", "0")
    with pytest.raises(OSError, match="shape is not known by name"):
        run("model.source=some/other-model")
    with pytest.raises(OSError, match="zero9"):
        run("deepspeed=configs/zero9.json")

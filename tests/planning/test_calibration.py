"""Corrections from a measured step reach the plan."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support.planning import plan_of, setup_of

from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.calibration import MeasuredStep, calibrate, read_measured
from gasp_fast.planning.gpus import GPUS
from gasp_fast.planning.shapes import LLAVA_NEXT_VIDEO_7B, QWEN2_5_VL_7B, ModelShape
from gasp_fast.planning.step_time import step_seconds
from gasp_fast.planning.training_setup import SequenceSize

ONE_GPU = ("deepspeed=null", "train.batch_size=4")
SETUP, H200 = setup_of(*ONE_GPU), GPUS["h200"]
SIZE = SequenceSize(frames=16, tokens=9280, visual=9216, tracked=9216, anchors=3000, labelled=100)
TRUTH = {
    "decoder": 1.2, "attention": 1.5, "adapters": 0.9, "vision": 3.0, "lm head": 2.0, "heads": 1.3,
    "geometric loss": 1.1, "norms, activations": 0.8, "optimiser": 1.4,
}  # fmt: skip


def simulated(truth: dict[str, float], slowdown: float = 1.0, late: float = 0.0) -> MeasuredStep:
    """A step of a GPU with these factors, under a profiler that slows it down; the host is late by a share of it."""
    parts = step_seconds(SETUP, [(1.0, SIZE)], 1, H200, Assumptions(factors=truth))
    parts = {part: seconds for part, seconds in parts.items() if part in TRUTH}
    return MeasuredStep(
        seconds=(1 + late) * sum(parts.values()),
        micro_batches=[[SIZE]] * 4,
        parts={part: slowdown * value for part, value in parts.items()},
    )


def test_calibration_finds_the_factors_of_the_step() -> None:
    assert calibrate(SETUP, H200, simulated(TRUTH)) == pytest.approx(TRUTH)


def test_a_profiler_that_slows_things_down_does_not_slow_the_plan() -> None:
    assert calibrate(SETUP, H200, simulated(TRUTH, slowdown=1.5)) == pytest.approx(TRUTH)


def test_what_belongs_to_no_part_is_not_lost() -> None:
    step = simulated(TRUTH)
    rest = replace(step, seconds=1.1 * step.seconds, parts={**step.parts, "rest": 0.1 * step.seconds})
    assert calibrate(SETUP, H200, rest) == pytest.approx({part: 1.1 * factor for part, factor in TRUTH.items()})


def test_a_late_host_is_calibrated_and_its_step_is_reproduced() -> None:
    step = simulated(TRUTH, late=0.3)
    factors = calibrate(SETUP, H200, step)
    assert factors["host"] > 0 and "host" not in calibrate(SETUP, H200, simulated(TRUTH))
    again = step_seconds(SETUP, [(1.0, SIZE)], 1, H200, Assumptions(factors=factors))
    assert again["idle"] > 0 and sum(again.values()) == pytest.approx(step.seconds, rel=0.02)


def test_a_host_takes_no_longer_than_a_step_in_which_nothing_waited_for_it() -> None:
    step = simulated(dict.fromkeys(TRUTH, 0.05))
    factors = calibrate(SETUP, H200, step)
    again = step_seconds(SETUP, [(1.0, SIZE)], 1, H200, Assumptions(factors=factors))
    assert factors["host"] < 1 and sum(again.values()) == pytest.approx(step.seconds, rel=0.02)


def test_a_calibrated_plan_predicts_another_number_of_frames() -> None:
    calibrated = Assumptions(factors=calibrate(SETUP, H200, simulated(TRUTH)))
    frames = [f"data.scenes.sequences.{end}_frames=24" for end in ("min", "max")]
    other = [*ONE_GPU, "data.scenes.annotations=[]", "data.qa.weight=0", *frames]
    plan, truth = (plan_of(*other, gpus=1, assumptions=assumed) for assumed in (calibrated, Assumptions(factors=TRUTH)))
    assert plan.step_seconds == pytest.approx(truth.step_seconds)
    assert plan.step_seconds != pytest.approx(plan_of(*other, gpus=1).step_seconds, rel=0.1)


def measured_file(folder: Path, shape: ModelShape = QWEN2_5_VL_7B) -> Path:
    """A result of the step benchmark with one calibrated step."""
    case = {"name": "a step", "shape": asdict(shape), "factors": calibrate(SETUP, H200, simulated(TRUTH))}
    path = folder / "step.json"
    path.write_text(json.dumps({"machine": "NVIDIA H200", "date": "2026-01-01", "cases": [{"name": "none"}, case]}))
    return path


def test_a_measured_file_gives_the_first_calibrated_step_of_the_model(tmp_path: Path) -> None:
    assumptions, name = read_measured(measured_file(tmp_path), QWEN2_5_VL_7B)
    assert assumptions.factors == pytest.approx(TRUTH) and assumptions.link == Assumptions().link
    assert name == "a step on NVIDIA H200, 2026-01-01"


def test_a_file_that_measures_nothing_useful_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"gone\.json cannot be read"):
        read_measured(tmp_path / "gone.json", QWEN2_5_VL_7B)
    with pytest.raises(ValueError, match="no calibrated step of a model of this shape"):
        read_measured(measured_file(tmp_path, LLAVA_NEXT_VIDEO_7B), QWEN2_5_VL_7B)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="no result of"):
        read_measured(tmp_path / "other.json", QWEN2_5_VL_7B)
    for factors in ([1.0], {"host": "x"}, {"host": -1.0}, {"host": float("nan")}):
        result = json.loads(measured_file(tmp_path).read_text())
        result["cases"][1]["factors"] = factors
        (tmp_path / "other.json").write_text(json.dumps(result))
        with pytest.raises(ValueError, match="no result of"):
            read_measured(tmp_path / "other.json", QWEN2_5_VL_7B)

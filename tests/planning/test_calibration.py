"""Efficiencies of a measured step reach the plan."""

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
from gasp_fast.planning.step_time import optimiser_seconds, sequence_seconds
from gasp_fast.planning.training_setup import SequenceSize

ONE_GPU = ("deepspeed=null", "train.batch_size=4")
SETUP, H200 = setup_of(*ONE_GPU), GPUS["h200"]
TRUTH = Assumptions(decoder=0.5, attention=0.3, adapters=0.2, vision=0.1, heads=0.4, loss=0.25, bandwidth=0.6,
                    optimiser=0.8, idle=0.07)  # fmt: skip
MEASURED_FIELDS = {
    "decoder", "attention", "adapters", "vision", "heads", "loss", "bandwidth", "optimiser", "idle",
}  # fmt: skip


def simulated(truth: Assumptions, slowdown: float = 1.0) -> MeasuredStep:
    """A step of a GPU that behaves exactly as assumed, under a profiler that slows it down."""
    size = SequenceSize(frames=16, tokens=9280, visual=9216, tracked=9216, anchors=3000, labelled=100)
    parts = sequence_seconds(SETUP, size, H200, truth)
    parts["optimiser"] = optimiser_seconds(SETUP, 1, H200, truth)
    busy = 4 * (sum(parts.values()) - parts["optimiser"]) + parts["optimiser"]
    return MeasuredStep(
        seconds=(1 + truth.idle) * busy,
        accumulation=4,
        sequences=[size],
        parts={part: slowdown * value for part, value in parts.items()},
    )


def test_calibration_finds_the_efficiencies_of_the_step() -> None:
    measured = calibrate(SETUP, H200, simulated(TRUTH))
    assert measured.keys() == MEASURED_FIELDS
    for name, value in measured.items():
        assert value == pytest.approx(getattr(TRUTH, name)), name


def test_a_profiler_that_slows_things_down_does_not_slow_the_plan() -> None:
    truth = replace(TRUTH, idle=0.0)
    measured = calibrate(SETUP, H200, simulated(truth, slowdown=1.5))
    assert measured["idle"] == 0 and measured["decoder"] == pytest.approx(truth.decoder)


def test_a_calibrated_plan_predicts_another_number_of_frames() -> None:
    calibrated = replace(Assumptions(), **calibrate(SETUP, H200, simulated(TRUTH)))
    frames = [f"data.scenes.sequences.{end}_frames=24" for end in ("min", "max")]
    other = [*ONE_GPU, "data.scenes.annotations=[]", "data.qa.weight=0", *frames]
    plan, truth = (plan_of(*other, gpus=1, assumptions=assumed) for assumed in (calibrated, TRUTH))
    assert plan.step_seconds == pytest.approx(truth.step_seconds)
    assert plan.step_seconds != pytest.approx(plan_of(*other, gpus=1).step_seconds, rel=0.1)


def measured_file(folder: Path, shape: ModelShape = QWEN2_5_VL_7B) -> Path:
    """A result of the step benchmark with one calibrated step."""
    case = {"name": "a step", "shape": asdict(shape), "assumptions": calibrate(SETUP, H200, simulated(TRUTH))}
    path = folder / "step.json"
    path.write_text(json.dumps({"machine": "NVIDIA H200", "date": "2026-01-01", "cases": [{"name": "none"}, case]}))
    return path


def test_a_measured_file_gives_the_first_calibrated_step_of_the_model(tmp_path: Path) -> None:
    assumptions, name = read_measured(measured_file(tmp_path), QWEN2_5_VL_7B)
    assert assumptions.vision == pytest.approx(TRUTH.vision) and assumptions.link == Assumptions().link
    assert name == "a step on NVIDIA H200, 2026-01-01"


def test_a_file_that_measures_nothing_useful_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"gone\.json cannot be read"):
        read_measured(tmp_path / "gone.json", QWEN2_5_VL_7B)
    with pytest.raises(ValueError, match="no calibrated step of a model of this shape"):
        read_measured(measured_file(tmp_path, LLAVA_NEXT_VIDEO_7B), QWEN2_5_VL_7B)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="no result of"):
        read_measured(tmp_path / "other.json", QWEN2_5_VL_7B)

"""What the step benchmark promises: every path runs without a GPU, every product finds its part, and plans learn."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gasp_fast.backbones.tiny import REAL, build_without_weights
from gasp_fast.cli import plan as command
from gasp_fast.config.loader import load_config
from gasp_fast.planning.calibration import MeasuredStep, calibrate, read_measured
from gasp_fast.planning.cost_model import GPU, GPUS, make_plan, optimiser_seconds, seconds
from gasp_fast.planning.shapes import LLAVA_NEXT_VIDEO_7B, QWEN2_5_VL_7B, ModelShape, shape_of
from gasp_fast.planning.workload import Assumptions, Sequence
from gasp_fast.training.config import TrainConfig

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import step  # noqa: E402
import step_cases  # noqa: E402
import step_profile  # noqa: E402
import step_report  # noqa: E402


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a dry run leaves behind."""
    folder = tmp_path_factory.mktemp("step")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["step.py", "--shape", "tiny", "--out", str(folder)])
        step.main()
    return folder


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    (path,) = out.glob("step-*.json")
    return json.loads(path.read_text())


# ---- the dry run ----------------------------------------------------------------------------------------------------


def test_every_case_is_measured_or_says_why_not(result: dict[str, Any], out: Path) -> None:
    cases = list(step_cases.cases("tiny"))
    assert [record["name"] for record in result["cases"]] == [case.name for case in cases]
    for record in result["cases"]:
        if "failed" in record:
            assert "needs a GPU and bf16" in record["failed"] or "liger-kernel" in record["failed"]
            continue
        assert len(record["step_seconds_all"]) == step_cases.MEASURED and record["step_seconds"] > 0
        assert record["tokens_per_s"] > 0 and record["mfu"] > 0
    assert sum("failed" not in record for record in result["cases"]) >= 5
    assert result["machine"] and result["date"] and torch.__version__.startswith(result["versions"]["torch"][:5])
    assert len(list(out.glob("*.png"))) == 1


def test_a_profile_sees_every_part(result: dict[str, Any]) -> None:
    profiles = [record for record in result["cases"] if "seconds_by_part" in record]
    assert {record["family"] for record in profiles} == set(REAL)
    for record in profiles:
        parts = record["seconds_by_part"]
        assert parts.keys() == set(step_profile.PARTS)
        assert parts["rest"] < 0.15 * sum(parts.values())
        assert record["attention_operations"]


def test_a_plan_reproduces_the_step_it_was_calibrated_with(result: dict[str, Any]) -> None:
    for record in result["cases"]:
        if "assumptions" in record:
            assert abs(record["plan_error"]) < 0.15


def test_products_are_told_apart_forward_backward_and_recomputed(config: Any, family: str) -> None:
    from gasp_fast.training.model import build_model
    from gasp_fast.training.stream import SampleStream, Share, make_loader

    recipe = config(family, train={"checkpointing": "non_reentrant"})
    model = build_model(recipe, torch.device("cpu")).train()
    stream = SampleStream(recipe.data)
    batch = next(iter(make_loader(recipe.data, stream, model.backbone, Share(0, 1, 1, 1), 1, pin_memory=False)))
    with step_profile.profiled(model) as found:
        model(**batch)["loss"].backward()
    events = list(found.events())
    made = step_profile._nodes(events)
    products: dict[str, int] = {}
    for event in events:
        if event.name in ("aten::mm", "aten::addmm"):
            part = step_profile._part_of(event, made)
            products[part] = products.get(part, 0) + 1
    layers, layer_products = model.backbone.layer_count, 7
    # Frozen weights: once forward, once again, once backward, where the first layer's q, k and v need none.
    assert products["decoder"] == pytest.approx(3 * layers * layer_products, abs=layer_products)
    assert products["heads"] == 6 * layers  # two products forward, two for each of them backward
    assert products["adapters"] == pytest.approx(4 * layers * 2 * 4, abs=8)
    assert products.get("rest", 0) <= 2


def test_what_runs_out_of_memory_or_breaks_is_recorded_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    case = step_cases.Case(family="qwen2_5_vl", frames=2)
    for error, said in ((torch.OutOfMemoryError("CUDA"), "out of memory"), (KeyError("x"), "KeyError: 'x'")):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(step, "measure", fail)
        assert step.tried(case, None, GPUS["h100"])["failed"] == said  # type: ignore[arg-type]


def test_what_one_case_replaces_in_transformers_is_back_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    own = modeling_llama.LlamaMLP

    def replace_classes(*_: Any) -> dict[str, Any]:  # as Liger does
        modeling_llama.LlamaMLP = torch.nn.Identity  # type: ignore[misc,assignment]
        return {}

    monkeypatch.setattr(step, "measure", replace_classes)
    step.tried(step_cases.Case(family="llava_next_video", frames=2), None, GPUS["h100"])  # type: ignore[arg-type]
    assert modeling_llama.LlamaMLP is own


def test_the_real_shapes_are_those_of_the_real_models(tmp_path: Path) -> None:
    for name, known in (("qwen2_5_vl", QWEN2_5_VL_7B), ("llava_next_video", LLAVA_NEXT_VIDEO_7B)):
        assert shape_of(str(build_without_weights(tmp_path / name, REAL[name]))) == known


# ---- verdicts -------------------------------------------------------------------------------------------------------


def record(family: str, frames: int, geometry: bool, seconds: float, memory: float, **more: Any) -> dict[str, Any]:
    case = asdict(step_cases.Case(family=family, frames=frames, geometry=geometry))
    return {**case, "step_seconds": seconds, "peak_memory": memory, "mfu": 0.4, "sequences_per_s": 4 / seconds, **more}


def test_targets_are_met_missed_or_not_measured() -> None:
    cases = [
        record("qwen2_5_vl", 24, True, 1.0, 50e9, plan_error=-0.2),
        record("qwen2_5_vl", 24, False, 0.91, 45e9, plan_error=0.1),
        record("qwen2_5_vl", 24, False, 0.1, 1e9, heads="bf16", plan_error=0.9),  # no recipe: judges nothing
        record("llava_next_video", 16, True, 0.8, 40e9, mfu=0.5),
    ]
    verdicts = {verdict["target"]: verdict for verdict in step_report.judged({"cases": cases})}
    told = {target: verdict["met"] for target, verdict in verdicts.items()}
    assert told == {
        "qwen2_5_vl, 24 frames: geometry's share of time": True,
        "qwen2_5_vl, 24 frames: geometry's share of peak memory": False,
        "qwen2_5_vl: best MFU with geometry": False,
        "llava_next_video, 16 frames: geometry's share of time": None,
        "llava_next_video, 16 frames: geometry's share of peak memory": None,
        "llava_next_video: best MFU with geometry": True,
        "LLaVA, 16 frames: sequences/s (wanted of an H200)": True,
        "plan: worst error on the recipes' steps": False,
    }
    assert verdicts["qwen2_5_vl, 24 frames: geometry's share of time"]["found"] == pytest.approx(0.09)


# ---- from a measured step to a plan ---------------------------------------------------------------------------------

RECIPE = load_config(TrainConfig, ROOT / "configs" / "qwen2_5_vl_7b.yaml", ["deepspeed=null", "train.batch_size=4"])
H200 = GPUS["h200"]
TRUTH = Assumptions(decoder=0.5, attention=0.3, adapters=0.2, vision=0.1, heads=0.4, loss=0.25, bandwidth=0.6,
                    optimiser=0.8, idle=0.07)  # fmt: skip
SEEN = Sequence(frames=16, tokens=9280, visual=9216, tracked=9216, anchors=3000, labelled=100)


def pretended(truth: Assumptions, slowdown: float = 1.0) -> MeasuredStep:
    """A step of a GPU that behaves exactly as assumed, under a profiler that slows it down."""
    parts = seconds(RECIPE, QWEN2_5_VL_7B, SEEN, H200, truth)
    parts["optimiser"] = optimiser_seconds(RECIPE, QWEN2_5_VL_7B, 1, H200, truth)
    busy = 4 * (sum(parts.values()) - parts["optimiser"]) + parts["optimiser"]
    return MeasuredStep(
        seconds=(1 + truth.idle) * busy,
        accumulation=4,
        sequences=[SEEN],
        parts={part: slowdown * value for part, value in parts.items()},
    )


def test_calibration_finds_the_efficiencies_that_made_the_step() -> None:
    found = calibrate(RECIPE, QWEN2_5_VL_7B, H200, pretended(TRUTH))
    assert found.keys() == {
        "decoder",
        "attention",
        "adapters",
        "vision",
        "heads",
        "loss",
        "bandwidth",
        "optimiser",
        "idle",
    }
    for name, value in found.items():
        assert value == pytest.approx(getattr(TRUTH, name)), name


def test_a_profiler_that_slows_things_down_does_not_slow_the_plan() -> None:
    truth = replace(TRUTH, idle=0.0)
    found = calibrate(RECIPE, QWEN2_5_VL_7B, H200, pretended(truth, slowdown=1.5))
    assert found["idle"] == 0 and found["decoder"] == pytest.approx(truth.decoder)


def test_a_calibrated_plan_predicts_another_number_of_frames() -> None:
    found = replace(Assumptions(), **calibrate(RECIPE, QWEN2_5_VL_7B, H200, pretended(TRUTH)))
    other = ["data.scenes.annotations=[]", "data.qa.weight=0"]
    other += [f"data.scenes.sequences.{end}_frames=24" for end in ("min", "max")]
    config = load_config(
        TrainConfig, ROOT / "configs" / "qwen2_5_vl_7b.yaml", ["deepspeed=null", "train.batch_size=4", *other]
    )
    plan, truth = (make_plan(config, QWEN2_5_VL_7B, 1, H200, given) for given in (found, TRUTH))
    assert plan.step_seconds == pytest.approx(truth.step_seconds)
    assert plan.step_seconds != pytest.approx(make_plan(config, QWEN2_5_VL_7B, 1, H200).step_seconds, rel=0.1)


def measured_file(folder: Path, shape: ModelShape = QWEN2_5_VL_7B, gpu: GPU = H200) -> Path:
    found = calibrate(RECIPE, QWEN2_5_VL_7B, gpu, pretended(TRUTH))
    case = {"name": "a step", "shape": asdict(shape), "assumptions": found}
    path = folder / "step.json"
    path.write_text(json.dumps({"machine": "NVIDIA H200", "date": "2026-01-01", "cases": [{"name": "none"}, case]}))
    return path


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    recipe = [str(ROOT / "configs" / "qwen2_5_vl_7b.yaml"), f"deepspeed={ROOT}/configs/deepspeed/zero1.json"]
    return command.run(parser.parse_args([*recipe, *words]))


def test_the_command_plans_with_what_was_measured(tmp_path: Path, capsys: Any) -> None:
    path = measured_file(tmp_path)
    assert read_measured(path, QWEN2_5_VL_7B)[0].vision == pytest.approx(TRUTH.vision)
    run()
    assumed = capsys.readouterr().out
    run("--measured", str(path))
    shown = " ".join(capsys.readouterr().out.split())
    assert "efficiencies are those of a step on NVIDIA H200, 2026-01-01" in shown
    assert "not yet measured" not in shown and "idle" in shown and "idle" not in assumed


def test_a_file_that_measures_nothing_useful_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"gone\.json cannot be read"):
        run("--measured", str(tmp_path / "gone.json"))
    with pytest.raises(ValueError, match="no calibrated step of a model of this shape"):
        run("--measured", str(measured_file(tmp_path, LLAVA_NEXT_VIDEO_7B)))
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="no result of"):
        run("--measured", str(tmp_path / "other.json"))

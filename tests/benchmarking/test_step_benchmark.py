"""The step benchmark runs every path without a GPU, and attributes every product to its part of the model."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from gasp_fast.backbones.tiny import SIZES_7B, build_tiny
from gasp_fast.planning.gpus import GPUS
from gasp_fast.planning.shapes import LLAVA_NEXT_VIDEO_7B, QWEN2_5_VL_7B, shape_from_source
from gasp_fast.training.model import build_model
from gasp_fast.training.stream import SampleStream, Share, make_loader

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import step  # noqa: E402
import step_cases  # noqa: E402
import step_profile  # noqa: E402
import step_report  # noqa: E402


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of results of a run on small shapes."""
    folder = tmp_path_factory.mktemp("step")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["step.py", "--shape", "tiny", "--out", str(folder)])
        step.main()
    return folder


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    (path,) = out.glob("step-*.json")
    return json.loads(path.read_text())


# ---- a run on small shapes ------------------------------------------------------------------------------------------


def test_every_case_is_measured_or_gives_the_reason(result: dict[str, Any], out: Path) -> None:
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


@pytest.mark.alone
def test_a_profile_has_every_part(result: dict[str, Any]) -> None:
    profiles = [record for record in result["cases"] if "seconds_by_part" in record]
    assert {record["family"] for record in profiles} == set(SIZES_7B)
    for record in profiles:
        parts = record["seconds_by_part"]
        assert parts.keys() == set(step_profile.PARTS)
        assert parts["rest"] < 0.15 * sum(parts.values())
        assert record["attention_operations"]


def test_a_plan_reproduces_the_step_it_was_calibrated_with(result: dict[str, Any]) -> None:
    for record in result["cases"]:
        if "assumptions" in record:
            assert abs(record["plan_error"]) < 0.15


def test_products_are_attributed_to_their_part_forward_backward_and_recomputed(config: Any, family: str) -> None:
    recipe = config(family, train={"checkpointing": "non_reentrant"})
    model = build_model(recipe, torch.device("cpu")).train()
    stream = SampleStream(recipe.data)
    batch = next(iter(make_loader(recipe.data, stream, model.backbone, Share(0, 1, 1, 1), 1, pin_memory=False)))
    with step_profile.profiled(model) as measured:
        model(**batch)["loss"].backward()
    events = step_profile.events_by_part(measured)
    products = Counter(part for part, event in events if event.name in ("aten::mm", "aten::addmm"))
    layers, layer_products = model.backbone.layer_count, 7
    # Frozen weights: once forward, once again, once backward, where the first layer's q, k and v need none.
    assert products["decoder"] == pytest.approx(3 * layers * layer_products, abs=layer_products)
    assert products["heads"] == 6 * layers  # two products forward, two for each of them backward
    assert products["adapters"] == pytest.approx(4 * layers * 2 * 4, abs=8)
    assert products["rest"] <= 2


def test_a_case_that_fails_is_recorded_with_the_reason_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    case = step_cases.Case(family="qwen2_5_vl", frames=2)
    for error, reason in ((torch.OutOfMemoryError("CUDA"), "out of memory"), (KeyError("x"), "KeyError: 'x'")):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(step, "measure", fail)
        assert step.measure_or_reason(case, None, GPUS["h100"])["failed"] == reason  # type: ignore[arg-type]


def test_what_one_case_replaces_in_transformers_is_restored_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    own = modeling_llama.LlamaMLP

    def replace_classes(*_: Any) -> dict[str, Any]:  # as Liger does
        modeling_llama.LlamaMLP = torch.nn.Identity  # type: ignore[misc,assignment]
        return {}

    monkeypatch.setattr(step, "measure", replace_classes)
    step.measure_or_reason(step_cases.Case(family="llava_next_video", frames=2), None, GPUS["h100"])  # type: ignore[arg-type]
    assert modeling_llama.LlamaMLP is own


def test_the_real_shapes_are_those_of_the_real_models(tmp_path: Path) -> None:
    for name, known in (("qwen2_5_vl", QWEN2_5_VL_7B), ("llava_next_video", LLAVA_NEXT_VIDEO_7B)):
        assert shape_from_source(str(build_tiny(tmp_path / name, SIZES_7B[name], weights=False))) == known


# ---- verdicts -------------------------------------------------------------------------------------------------------


def record(family: str, frames: int, geometry: bool, seconds: float, memory: float, **more: Any) -> dict[str, Any]:
    case = asdict(step_cases.Case(family=family, frames=frames, geometry=geometry))
    return {**case, "step_seconds": seconds, "peak_memory": memory, "mfu": 0.4, "sequences_per_s": 4 / seconds, **more}


def test_targets_are_met_missed_or_not_measured() -> None:
    cases = [
        record("qwen2_5_vl", 24, True, 1.0, 50e9, plan_error=-0.2),
        record("qwen2_5_vl", 24, False, 0.91, 45e9, plan_error=0.1),
        record("qwen2_5_vl", 24, False, 0.1, 1e9, heads="bf16", plan_error=0.9),  # not a recipe's settings: ignored
        record("llava_next_video", 16, True, 0.8, 40e9, mfu=0.5),
    ]
    verdicts = {verdict["target"]: verdict for verdict in step_report.verdicts({"cases": cases})}
    assert {target: verdict["met"] for target, verdict in verdicts.items()} == {
        "qwen2_5_vl, 24 frames: geometry's share of time": True,
        "qwen2_5_vl, 24 frames: geometry's share of peak memory": False,
        "qwen2_5_vl: best MFU with geometry": False,
        "llava_next_video, 16 frames: geometry's share of time": None,
        "llava_next_video, 16 frames: geometry's share of peak memory": None,
        "llava_next_video: best MFU with geometry": True,
        "LLaVA, 16 frames: sequences/s (of an H200)": True,
        "plan: worst error on the recipes' steps": False,
    }
    assert verdicts["qwen2_5_vl, 24 frames: geometry's share of time"]["value"] == pytest.approx(0.09)

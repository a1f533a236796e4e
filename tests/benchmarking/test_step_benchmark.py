"""The step benchmark runs every path without a GPU, and attributes every product to its part of the model."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gasp_fast.backbones.tiny import SIZES_7B, build_tiny
from gasp_fast.planning.shapes import LLAVA_NEXT_VIDEO_7B, QWEN2_5_VL_7B, shape_from_source
from gasp_fast.training.distributed import Processes
from gasp_fast.training.loader import make_loader
from gasp_fast.training.model import build_model
from gasp_fast.training.stream import SampleStream, Share

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import step  # noqa: E402
import step_cases  # noqa: E402
import step_ours  # noqa: E402
import step_pauses  # noqa: E402
import step_profile  # noqa: E402
import step_report  # noqa: E402
import step_trainer  # noqa: E402


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


@pytest.mark.alone
def test_every_case_is_measured_or_gives_the_reason(result: dict[str, Any], out: Path) -> None:
    cases = [case for group in step_cases.groups("tiny") for case in group]
    assert [record["name"] for record in result["cases"]] == [case.name for case in cases]
    for record in result["cases"]:
        if "failed" in record:
            assert record["attention"] or record["liger"]  # on a CPU without FlashAttention and Liger
            assert "GPU" in record["failed"] or "liger-kernel" in record["failed"]
            continue
        assert len(record["all_seconds"]) == step_cases.ROUNDS and record["step_seconds"] > 0
        assert record["tokens_per_s"] > 0 and record["mfu"] > 0
    assert sum("failed" not in record for record in result["cases"]) >= 7
    assert result["machine"] and result["date"] and torch.__version__.startswith(result["versions"]["torch"][:5])
    assert len(list(out.glob("*.png"))) == 1


def essential(result: dict[str, Any], family: str) -> tuple[dict[str, Any], ...]:
    """Our step with geometry, the Trainer's, and ours without."""
    with_geometry, trainer, plain = (r for r in result["cases"] if r["family"] == family and r["essential"])
    assert trainer["trainer"] and with_geometry["geometry"] and not plain["geometry"] and not plain["trainer"]
    return with_geometry, trainer, plain


@pytest.mark.alone
@pytest.mark.parametrize("family", SIZES_7B)
def test_our_step_and_the_trainers_see_the_same_sequences(result: dict[str, Any], family: str) -> None:
    ours, trainer, plain = essential(result, family)
    tokens = step_cases.SHAPES["tiny"].batch_sizes[family] * ours["tokens_per_sequence"]
    assert ours["tokens"] == trainer["tokens"] == round(tokens)  # that really went through the decoder in a step
    assert len(ours["all_seconds"]) == len(trainer["all_seconds"]) == len(plain["all_seconds"])


@pytest.mark.alone
@pytest.mark.parametrize("family", SIZES_7B)
def test_the_kernels_that_ran_are_recorded(result: dict[str, Any], family: str) -> None:
    ours, trainer, _ = essential(result, family)
    assert trainer["recomputed"] == trainer["layers"] == 2 and trainer["replaced"] == {}
    assert trainer["vision_graph"] and not ours["vision_graph"]  # the usual step differentiates the frozen tower
    for record in (ours, trainer):
        assert any("scaled_dot_product" in name for name in record["attention_operations"])


@pytest.mark.alone
@pytest.mark.parametrize("family", SIZES_7B)
def test_our_step_with_geometry_is_no_slower_than_the_trainers_without(result: dict[str, Any], family: str) -> None:
    assert essential(result, family)[0]["process_seconds_to_trainer"] <= 1


@pytest.mark.alone
def test_a_profile_has_every_part(result: dict[str, Any]) -> None:
    profiles = [record for record in result["cases"] if "seconds_by_part" in record]
    assert {record["family"] for record in profiles} == set(SIZES_7B)
    for record in profiles:
        parts = record["seconds_by_part"]
        missing = {"heads", "geometric loss"} if record["trainer"] else set()
        assert parts.keys() == set(step_profile.PARTS) - missing
    ours = [record["seconds_by_part"] for record in profiles if not record["trainer"]]
    assert sum(parts["rest"] for parts in ours) < 0.15 * sum(sum(parts.values()) for parts in ours)


def test_the_kernels_of_each_part_are_listed_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [("heads", "a", 2.0), ("rest", "c", 1.0), ("heads", "b", 9.0), ("heads", "a", 3.0)]
    events = [(part, SimpleNamespace(kernels=[SimpleNamespace(name=name, duration=t)])) for part, name, t in kernels]
    monkeypatch.setattr(step_profile, "events_by_part", lambda measured: events)
    measured: Any = None
    assert step_profile.kernels_by_part(measured) == {
        "heads": [("b", 0.009, 1), ("a", 0.005, 2)], "rest": [("c", 0.001, 1)],
    }  # fmt: skip


def test_pauses_are_what_no_kernel_covers() -> None:
    # Two kernels at once, a pause, a kernel inside another one, the same pause again.
    kernels = [
        (0, 50, "a"),
        (20, 90, "b"),
        (100, 300, "c"),
        (120, 140, "d"),
        (350, 400, "a"),
        (380, 410, "b"),
        (413, 414, "c"),
    ]
    assert step_pauses.pauses(step_pauses.Activity(start, end, name) for start, end, name in kernels) == {
        "span_seconds": 414e-9,
        "idle_seconds": 63e-9,
        "pauses": [["c", "a", 50e-6, 1, 50e-6], ["b", "c", 13e-6, 2, 10e-6]],
    }
    assert step_pauses.pauses([]) == {"span_seconds": 0.0, "idle_seconds": 0.0, "pauses": []}


def test_steps_in_a_row_are_taken_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = step_cases.Case(family="qwen2_5_vl", frames=2, geometry=False)
    data, processes = step_cases.CaseData(step_cases.SHAPES["tiny"], tmp_path), Processes(0, 1, torch.device("cpu"))
    config, (batches, _) = data.config(case), data.batches(case)
    ours = step_ours.OurSteps(config, step_ours.Base(config, processes.device), batches, processes)
    taken: list[int] = []
    take = ours.loop.train_step
    monkeypatch.setattr(ours.loop, "train_step", lambda number, some: (taken.append(number), take(number, some)))
    ours.ask("step"), ours.ask("row"), ours.ask("step")
    assert ours.ask("pauses")["pauses"]["pauses"] == []  # those of a GPU
    ours.close()
    assert taken == list(range(1, 4 + step_trainer.ROW))


@pytest.mark.alone
def test_a_plan_reproduces_the_step_it_was_calibrated_with(result: dict[str, Any]) -> None:
    calibrated = [record for record in result["cases"] if "factors" in record]
    assert len(calibrated) == len(SIZES_7B)
    for record in calibrated:
        assert abs(record["plan_error"]) < 0.15


def test_products_are_attributed_to_their_part_forward_backward_and_recomputed(config: Any, family: str) -> None:
    recipe = config(family, train={"checkpointing": "non_reentrant"})
    model = build_model(recipe, torch.device("cpu")).train()
    stream = SampleStream(recipe.data)
    batch = next(iter(make_loader(recipe.data, stream, model.backbone, Share(0, 1, 1, 1), 1, pin_memory=False)))
    with step_profile.profiled(model) as measured:
        model(**batch)["loss"].backward()
    events = step_profile.events_by_part(measured)
    names = "aten::mm", "aten::addmm", "aten::addmm_"
    products = Counter(part for part, event in events if event.name in names)
    layers, layer_products = model.backbone.layer_count, 7
    # Frozen weights: once forward, once again, once backward, where the first layer's q, k and v need none.
    assert products["decoder"] == pytest.approx(3 * layers * layer_products, abs=layer_products)
    assert products["heads"] == 6 * layers  # two products forward, two for each of them backward
    assert products["adapters"] == pytest.approx(4 * layers * 2 * 4, abs=8)
    assert products["rest"] <= 2


def test_a_case_that_fails_is_recorded_with_the_reason_and_the_others_of_its_group_go_on(tmp_path: Path) -> None:
    fine = step_cases.Case(family="qwen2_5_vl", frames=2, geometry=False)
    group = (replace(fine, attention="flash_attention_2"), fine)
    data = step_cases.CaseData(step_cases.SHAPES["tiny"], tmp_path)
    failed, measured = step.measure(group, data, step.this_gpu(), rounds=1)
    assert "needs a GPU" in failed["failed"] and measured["step_seconds"] > 0
    record: dict[str, Any] = {}
    with step.failure_recorded(record):
        raise torch.OutOfMemoryError("CUDA")
    assert record["failed"] == "out of memory"


def test_what_one_group_replaces_in_transformers_is_restored_for_the_next() -> None:
    from transformers.models.llama import modeling_llama

    own = modeling_llama.LlamaMLP
    with step.restored_transformers():
        modeling_llama.LlamaMLP = torch.nn.Identity  # type: ignore[misc,assignment]  # as Liger does
    assert modeling_llama.LlamaMLP is own


def test_the_real_shapes_are_those_of_the_real_models(tmp_path: Path) -> None:
    for name, known in (("qwen2_5_vl", QWEN2_5_VL_7B), ("llava_next_video", LLAVA_NEXT_VIDEO_7B)):
        assert shape_from_source(str(build_tiny(tmp_path / name, SIZES_7B[name], weights=False))) == known


# ---- verdicts -------------------------------------------------------------------------------------------------------


def record(family: str, frames: int, geometry: bool, seconds: float, memory: float, **more: Any) -> dict[str, Any]:
    case = {**asdict(step_cases.Case(family=family, frames=frames, geometry=geometry, essential=True)), **more}
    return {"step_seconds": seconds, "peak_memory": memory, "mfu": 0.4, "sequences_per_s": 4 / seconds, **case}


def test_targets_are_met_missed_or_not_measured() -> None:
    cases = [
        record("qwen2_5_vl", 24, True, 1.0, 50e9, head_bytes=2e9, plan_error=-0.2, seconds_to_trainer=0.5),
        record("qwen2_5_vl", 24, False, 0.91, 45e9, plan_error=0.1),
        record("qwen2_5_vl", 24, False, 2.0, 60e9, trainer=True),
        record("qwen2_5_vl", 24, False, 0.1, 1e9, heads="bf16", plan_error=0.9, essential=False),  # ignored
        record("llava_next_video", 16, True, 0.8, 40e9, mfu=0.5),
    ]
    verdicts = {verdict["target"]: verdict for verdict in step_report.verdicts({"cases": cases})}
    assert {target: verdict["met"] for target, verdict in verdicts.items()} == {
        "qwen2_5_vl, 24 frames: our step with geometry / the Trainer's without": True,
        "qwen2_5_vl, 24 frames: geometry's share of time": True,
        "qwen2_5_vl, 24 frames: geometry's share of peak memory, besides its weights and their states": False,
        "qwen2_5_vl: best MFU with geometry": False,
        "llava_next_video, 16 frames: our step with geometry / the Trainer's without": None,
        "llava_next_video, 16 frames: geometry's share of time": None,
        "llava_next_video, 16 frames: geometry's share of peak memory, besides its weights and their states": None,
        "llava_next_video: best MFU with geometry": True,
        "LLaVA, 16 frames: sequences/s (of an H200)": True,
        "plan: worst error on the essential steps": False,
    }
    assert verdicts["qwen2_5_vl, 24 frames: geometry's share of time"]["value"] == pytest.approx(0.09)
    memory = "qwen2_5_vl, 24 frames: geometry's share of peak memory, besides its weights and their states"
    assert verdicts[memory]["value"] == pytest.approx((50 - 45 - 2) / 50)

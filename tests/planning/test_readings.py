"""What each reading of the paper's totals implies, and what the shipped recipes cost."""

from __future__ import annotations

import re
from functools import cache

import pytest
from support.planning import ROOT, recipe

from gasp_fast.config.loader import load_config
from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.gpus import GPUS
from gasp_fast.planning.plan import PAPER_GPU_HOURS, Plan
from gasp_fast.planning.readings import readings
from gasp_fast.planning.shapes import QWEN2_5_VL_7B, shape_from_source
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.workload import plan_run, plans_of_readings

RECIPES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "configs").rglob("*.yaml")
    if "tiny" not in path.name and "g2vlm" not in path.parts
)
REPRODUCE = (ROOT / "docs" / "reproduce.md").read_text()


@cache
def load(name: str) -> TrainConfig:
    return load_config(TrainConfig, ROOT / name, [f"deepspeed={ROOT}/configs/deepspeed/zero1.json"])


@cache
def plan(name: str) -> Plan:
    config = load(name)
    return plan_run(config, shape_from_source(config.model.source), 32, GPUS["h200"])


def rows(heading: str) -> list[list[str]]:
    """The cells of the table of docs/reproduce.md whose first column is headed so."""
    [table] = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[- |]+\n((?:\|.*\n)+)", REPRODUCE, re.MULTILINE)
    return [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in table.splitlines()]


def test_the_readings_by_hand() -> None:
    found = {r.meaning: (r.sequences, r.questions) for r in readings(3, 2, 16, 320, 29_184)}
    assert found == {
        "sequences of an epoch": (1_750_000, 100_000),
        "sequences x grids": (875_000, 100_000),
        "sequences of all epochs": (583_333, 33_333),
        "frames of sequences": (109_375, 100_000),
        "tracks": (5_469, 100_000),
        "pairs of points": (60, 100_000),
    }
    assert [r.steps(3, 128) for r in readings(3, 2, 16, 320, 29_184)][:2] == [5_550_000 // 128, 2_925_000 // 128]


def plans(*overrides: str) -> dict[str, Plan]:
    """The plans of the Qwen recipe, by reading."""
    config = recipe(*overrides)
    found = plans_of_readings(config, QWEN2_5_VL_7B, 32, GPUS["h200"], Assumptions(), None)
    return {reading.meaning: plan for reading, plan in found}


def test_a_reading_follows_the_recipes_frames_grids_and_epochs() -> None:
    shorter = ["data.scenes.sequences.min_frames=4", "data.scenes.sequences.max_frames=6", "train.epochs=2"]
    steps = {name: plan.steps for name, plan in plans(*shorter, "data.scenes.grids=[8]").items()}
    assert steps["sequences x grids"] == steps["sequences of an epoch"] == 2 * 1_850_000 // 128
    assert steps["frames of sequences"] == 2 * (1_750_000 // 5 + 100_000) // 128
    assert steps["tracks"] == 2 * (round(1_750_000 / 32) + 100_000) // 128
    seen = sum(0.6 * frames * (0.6 * frames - 1) for frames in (4, 5, 6)) / 3
    assert steps["pairs of points"] == 2 * (round(1_750_000 / 32 / seen) + 100_000) // 128


def test_the_questions_of_a_reading_are_100_k_an_epoch_whatever_its_sequences() -> None:
    """The fewer sequences, the more of a step are questions."""
    shares = [sum(share for share, size in plan.mix if not size.tracked) for plan in plans().values()]
    assert shares[0] == pytest.approx(100 / 1850) == pytest.approx(shares[2], rel=1e-5)
    assert shares[1] == pytest.approx(100 / 975) and shares[-1] > 0.999


def test_a_reading_with_hardly_any_sequence_is_planned() -> None:
    """Fewer than the mixture would draw."""
    longer = ["data.scenes.sequences.min_frames=90", "data.scenes.sequences.max_frames=90", "train.batch_size=32"]
    assert list(plans(*longer).values())[-1].steps == 3 * (round(1_750_000 / 320 / (54 * 53)) + 100_000) // 32


def test_no_reading_where_an_epoch_is_not_scenes_and_questions() -> None:
    assert not plans("train.steps=10") and not plans("data.scenes.root=''") and not plans("data.qa.weight=0")
    sft = load("configs/sft_baseline.yaml")
    found = plans_of_readings(sft, QWEN2_5_VL_7B, 32, GPUS["h200"], Assumptions(), None)
    assert [plan.steps for _, plan in found] == [plan.steps for plan in plans().values()]


@pytest.mark.parametrize("name", RECIPES)
def test_every_7b_recipe_fits_an_h200(name: str) -> None:
    assert plan(name).fits


@pytest.mark.parametrize("name", [name for name in RECIPES if "budget" in name])
def test_a_budget_recipe_takes_no_more_than_the_papers_gpu_hours(name: str) -> None:
    """With room for the error of the estimate, which is 10 %."""
    assert 1.1 * plan(name).gpu_hours <= PAPER_GPU_HOURS == 320
    config, original = load(name), load(name.replace("_budget", ""))
    assert plan(name).steps == plan(name.replace("_budget", "")).steps
    assert config.data.scenes == original.data.scenes and config.loss == original.loss
    assert config.lora == original.lora and config.heads == original.heads


def test_the_costs_in_the_documentation_are_those_of_the_plan() -> None:
    written = {name.strip("`"): figures for name, *figures in rows("recipe, 32 H200")}
    assert written.keys() == {name for name in RECIPES if re.search(r"_\d+b[_.]", name)}
    for name, figures in written.items():
        expected = plan(name)
        assert figures == [f"{expected.steps:,}", f"{expected.hours:.1f}", f"{expected.gpu_hours:,.0f}"], name


def test_the_readings_in_the_documentation_are_those_of_the_plan() -> None:
    names = [f"configs/{name}.yaml" for name in ("qwen2_5_vl_7b", "qwen2_5_vl_7b_budget", "llava_next_video_7b")]
    expected: dict[str, list[str]] = {}
    for name in names:
        config = load(name)
        shape = shape_from_source(config.model.source)
        for reading, plan in plans_of_readings(config, shape, 32, GPUS["h200"], Assumptions(), None):
            row = expected.setdefault(reading.meaning, [f"{reading.sequences:,}", f"{plan.steps:,}"])
            row.append(f"{plan.gpu_hours:,.0f}")
    assert {meaning: figures for meaning, *figures in rows("1.75 M are")} == expected

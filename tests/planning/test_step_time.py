"""Time of a step: figures by hand, and the direction in which each setting moves it."""

from __future__ import annotations

import pytest
from support.planning import ROOT, plan_of, setup_of, zero

from gasp_fast.config.loader import load_config
from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.gpus import GPUS
from gasp_fast.planning.micro_batch_time import host_seconds
from gasp_fast.planning.shapes import LLAVA_NEXT_VIDEO_7B, QWEN2_5_VL_7B
from gasp_fast.planning.step_time import OVERHEADS, communication_bytes, deal_some_steps
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.workload import frame_tokens_of, plan_run, sequence_mix, training_setup


def test_bytes_sent_between_gpus_by_hand() -> None:
    trained, frozen = 4 * (80_740_352 + 359_812_096), 2 * 8_292_166_656
    assert communication_bytes(setup_of(zero("zero1")), 4) == 2 * trained
    assert communication_bytes(setup_of(zero("zero2")), 4) == 5 * trained
    assert communication_bytes(setup_of(zero("zero3")), 4) == 4 * (trained + 3 * (trained + frozen))


def test_synchronising_once_a_step_costs_less_waiting_than_at_every_sequence() -> None:
    assert plan_of(zero("zero1")).seconds["waiting"] < plan_of(zero("zero2")).seconds["waiting"] / 2
    assert plan_of(gpus=1).seconds["waiting"] == pytest.approx(0, abs=1e-12)


def test_waiting_and_the_useful_share_say_the_same() -> None:
    plan = plan_of()
    computed = sum(value for part, value in plan.seconds.items() if part not in OVERHEADS or part == "padding")
    assert computed / (computed + plan.seconds["waiting"]) == pytest.approx(plan.dealt.useful_share)
    assert plan.dealt.useful_share > 0.97


def test_sequences_that_are_padded_to_the_longest_one_take_longer() -> None:
    alone, four = plan_of(gpus=8), plan_of("train.micro_batch_size=4", gpus=8)
    assert alone.seconds["padding"] == 0 < four.seconds["padding"] < 0.1 * four.step_seconds
    assert four.seconds["vision"] == pytest.approx(alone.seconds["vision"])


def test_sequences_that_are_packed_are_not_padded() -> None:
    four = plan_of("train.micro_batch_size=4", gpus=8)
    packed = plan_of("train.micro_batch_size=4", "train.packing=true", gpus=8)
    assert packed.seconds["padding"] == 0 < four.seconds["padding"]
    assert packed.step_seconds < four.step_seconds and packed.memory == four.memory
    assert packed.seconds["attention"] == pytest.approx(four.seconds["attention"])


def test_micro_batches_by_tokens_spare_a_late_host_and_keep_gpus_equally_busy() -> None:
    """The LLaVA recipe, which has them, beside single sequences and groups of four."""
    plans = {
        name: plan_run(
            load_config(TrainConfig, ROOT / "configs/llava_next_video_7b.yaml", [zero("zero1"), *overrides]),
            LLAVA_NEXT_VIDEO_7B,
            32,
            GPUS["h200"],
        )
        for name, overrides in {
            "tokens": (),
            "one": ("train.tokens_at_once=null",),
            "four": ("train.tokens_at_once=null", "train.micro_batch_size=4"),
        }.items()
    }
    assert plans["tokens"].dealt.useful_share > 0.95 > plans["four"].dealt.useful_share
    assert plans["tokens"].seconds["idle"] == 0 < plans["one"].seconds["idle"]
    assert plans["tokens"].step_seconds < 0.8 * min(plans["one"].step_seconds, plans["four"].step_seconds)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["qwen2_5_vl_7b", "llava_next_video_7b"])
def test_gpus_are_busy_with_the_papers_mixture_on_32_of_them(recipe: str) -> None:
    shape = QWEN2_5_VL_7B if recipe.startswith("qwen") else LLAVA_NEXT_VIDEO_7B
    config, assumptions = load_config(TrainConfig, ROOT / f"configs/{recipe}.yaml"), Assumptions()
    assert config.data.qa.root and config.data.scenes.root  # geometry and questions
    mix = sequence_mix(config, frame_tokens_of(config, shape, assumptions), assumptions)
    dealt = deal_some_steps(training_setup(config, shape), mix, 32, GPUS["h200"], assumptions, steps=1_000)
    assert dealt.useful_share >= 0.95


def test_a_factor_changes_its_part_and_no_other() -> None:
    before = plan_of()
    after = plan_of(assumptions=Assumptions(factors={"vision": 2.0}))
    assert after.seconds["vision"] == pytest.approx(2 * before.seconds["vision"])
    assert {part for part in before.seconds if after.seconds[part] != before.seconds[part]} == {"vision", "waiting"}


def test_a_host_that_is_slow_enough_makes_the_gpu_wait() -> None:
    assert plan_of().seconds["idle"] == 0
    slow = plan_of(assumptions=Assumptions(factors={"host": 100.0}), gpus=1)
    assert slow.step_seconds == pytest.approx(
        slow.setup.accumulation(1) * 100 * host_seconds(slow.setup, Assumptions()) + slow.seconds["optimiser"]
    )

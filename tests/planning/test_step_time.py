"""Time of a step: figures by hand, and the direction in which each setting moves it."""

from __future__ import annotations

import pytest
from support.planning import plan_of, setup_of, zero

from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.step_time import communication_bytes, expected_slowest, host_seconds


def test_bytes_sent_between_gpus_by_hand() -> None:
    trained, frozen = 4 * (80_740_352 + 359_812_096), 2 * 8_292_166_656
    assert communication_bytes(setup_of(zero("zero1")), 4) == 2 * trained
    assert communication_bytes(setup_of(zero("zero2")), 4) == 5 * trained
    assert communication_bytes(setup_of(zero("zero3")), 4) == 4 * (trained + 3 * (trained + frozen))


def test_the_slowest_of_two_dice_by_hand() -> None:
    dice = [(1 / 6, float(eyes)) for eyes in range(1, 7)]
    assert expected_slowest(dice, 1) == pytest.approx(3.5)
    assert expected_slowest(dice, 2) == pytest.approx(161 / 36)
    assert expected_slowest(dice, 10_000) == pytest.approx(6)


def test_synchronising_once_a_step_costs_less_waiting_than_at_every_sequence() -> None:
    assert plan_of(zero("zero1")).seconds["waiting"] == pytest.approx(plan_of(zero("zero2")).seconds["waiting"] / 2)
    assert plan_of(gpus=1).seconds["waiting"] == pytest.approx(0, abs=1e-12)


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

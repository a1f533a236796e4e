"""Time of a step: figures by hand, and the direction in which each setting moves it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.planning import plan_of, setup_of, zero

from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.step_time import communication_bytes, expected_slowest


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
    assert plan_of(gpus=1).seconds["waiting"] == 0


def test_a_better_efficiency_makes_its_part_faster_and_no_other() -> None:
    before = plan_of(assumptions=Assumptions())
    after = plan_of(assumptions=replace(Assumptions(), vision=0.7))
    assert after.seconds["vision"] == pytest.approx(before.seconds["vision"] / 2)
    assert after.seconds["decoder"] == before.seconds["decoder"]

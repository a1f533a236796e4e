"""A recipe is planned with the sequences it draws and the steps it takes."""

from __future__ import annotations

import pytest
from support.planning import plan_of, recipe

from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.training.workload import sequence_mix


def test_every_length_and_source_is_planned_as_often_as_the_recipe_draws_it() -> None:
    mix = sequence_mix(recipe(), 576, Assumptions())
    assert sum(share for share, _ in mix) == pytest.approx(1)
    scenes = [(share, size) for share, size in mix if size.tracked]
    assert [size.frames for _, size in scenes] == list(range(8, 25))
    assert sum(share for share, _ in scenes) == pytest.approx(0.5)
    assert all(size.visual == size.frames * 576 and 0 < size.anchors <= size.visual for _, size in scenes)


def test_without_the_geometric_loss_nothing_is_tracked() -> None:
    mix = sequence_mix(recipe("loss.corr_weight=0", "loss.depth_weight=0"), 576, Assumptions())
    assert not any(size.tracked or size.anchors for _, size in mix)


def test_an_epoch_draws_one_question_for_each_sequence_of_a_scene() -> None:
    assert plan_of(sequences=1_750_000).steps == 1_750_000 * 3 * 2 // 128
    assert plan_of("train.steps=7").steps == 7

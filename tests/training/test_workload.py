"""A recipe is planned with the sequences it draws and the steps it takes."""

from __future__ import annotations

import pytest
from support.planning import plan_of, recipe

from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.gpus import GPUS
from gasp_fast.planning.shapes import QWEN2_5_VL_7B
from gasp_fast.training.stream import SampleStream
from gasp_fast.training.workload import known_epoch, plan_run, sequence_mix


def test_every_length_and_source_is_planned_as_often_as_the_recipe_draws_it() -> None:
    mix = sequence_mix(recipe(), 576, Assumptions())
    assert sum(share for share, _ in mix) == pytest.approx(1)
    scenes = [(share, size) for share, size in mix if size.tracked]
    assert [size.frames for _, size in scenes] == list(range(8, 25))
    assert sum(share for share, _ in scenes) == pytest.approx(1 / 1.057)
    assert all(size.visual == size.frames * 576 and 0 < size.anchors <= size.visual for _, size in scenes)


def test_without_the_geometric_loss_nothing_is_tracked() -> None:
    mix = sequence_mix(recipe("loss.corr_weight=0", "loss.depth_weight=0"), 576, Assumptions())
    assert not any(size.tracked or size.anchors for _, size in mix)


def test_an_epoch_is_a_pass_through_the_scenes_with_the_questions_between() -> None:
    assert plan_of("data.qa.weight=1.0", sequences=1_750_000).steps == 1_750_000 * 3 * 2 // 128
    assert plan_of(sequences=1_750_000).steps == 3 * 1_850_000 // 128  # 946 and 54 of each 1,000
    assert plan_of("train.steps=7").steps == 7


def test_the_planned_steps_are_those_that_a_stream_of_that_length_takes(config) -> None:
    settings = config(mixed=True, train={"steps": None, "epochs": 2.0}, qa={"weight": 0.057})
    stream = SampleStream(settings.data)
    planned = plan_run(settings, QWEN2_5_VL_7B, 1, GPUS["h200"], sequences=len(stream.sources["scenes"]))
    assert planned.steps == settings.train.steps_of(stream.epoch) == 2 * 1000 // 2


def test_without_scenes_an_epoch_is_the_limit_of_the_questions() -> None:
    assert known_epoch(recipe("data.scenes.root=''", "data.scenes.annotations=[]", "data.qa.limit=640")) == 640
    assert known_epoch(recipe()) is None

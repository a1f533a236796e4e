"""The estimate of a run of G²VLM: counted by hand, and against what a tiny model really has."""

from dataclasses import replace

import pytest
import torch
from support.tiny_g2vlm import WIDTH, tiny_g2vlm
from torch.utils.flop_counter import FlopCounterMode

from gasp_fast import cli
from gasp_fast.g2vlm.heads import GeometryHeads, HeadsConfig
from gasp_fast.g2vlm.planning import pack_flops, parameter_counts, plan_run
from gasp_fast.g2vlm.shapes import Shapes
from gasp_fast.g2vlm.tokens import Arrangement
from gasp_fast.planning.gpus import GPUS
from gasp_fast.planning.training_setup import Sharding
from gasp_fast.train import read_recipe

ALONE = Sharding.of(None)


def recipe(name="stage_1a", *overrides):
    return read_recipe(f"g2vlm/{name}", ["deepspeed=null", *overrides])


@pytest.mark.parametrize("name", ["stage_1a", "stage_1b"])
def test_a_step_of_the_full_shape_fits_one_gpu_of_80_gb(name):
    config = recipe(name)
    plan = plan_run(config, Shapes(), 1, GPUS["h100"], ALONE)
    assert plan.fits and plan.arrangement.frames == 24
    states = 16 * sum(count for name, count in plan.parameters.items() if "frozen" not in name)
    assert plan.memory_needed > states  # weights, gradients and two moments, float32


def test_without_recomputation_the_activations_of_long_packs_do_not_fit():
    config = recipe("stage_1b", "experts.checkpointing='off'", "heads.checkpointing=false")
    assert not plan_run(config, Shapes(), 1, GPUS["h100"], ALONE).fits


def test_products_are_those_that_a_forward_pass_takes():
    heads = HeadsConfig(hidden=WIDTH, width=32, layers=1, heads=2, point_width=32, camera_width=16)
    model = tiny_g2vlm(checkpointing="off").train()
    model.heads = GeometryHeads(heads).train()
    config = replace(recipe(), heads=heads, experts=model.config)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 2, 3, 28, 42))
    counted = sum(counter.get_flop_counts()["Global"].values())
    parts = pack_flops(config, Shapes.of(model), 1, Arrangement(2, 2, 3))
    assert sum(part.forward for part in parts.values()) == pytest.approx(counted, rel=0.06)


def test_what_is_frozen_has_no_gradient_and_no_optimiser_state():
    plans = {mode: recipe(name) for mode, name in (("geometric", "stage_1a"), ("semantic", "joint_frozen_geometry"))}
    for mode, config in plans.items():
        trained, frozen = parameter_counts(config, Shapes())
        assert ("geometric" in trained) == (mode == "geometric") and ("semantic" in frozen) == (mode == "geometric")
        memory = plan_run(config, Shapes(), 1, GPUS["h100"], ALONE).memory
        assert memory["optimiser"] == 8 * sum(trained.values()) and memory["gradients"] == 4 * sum(trained.values())
    assert "heads" not in pack_flops(plans["semantic"], Shapes(), 1, Arrangement(2, 16, 16))


def test_plan_prints_it_and_says_that_nothing_was_measured(capsys):
    assert cli.main(["plan", "g2vlm/stage_1a", "--gpus", "8", "--gpu", "h100"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "nothing of G²VLM has been measured on a GPU" in printed and "memory fits" in printed
    assert (
        cli.main(
            ["plan", "g2vlm/stage_1b", "--gpu", "h100", "experts.checkpointing='off'", "train.tokens_at_once=65712"]
        )
        == 1
    )

"""The estimate of a run moves in the right direction with every setting."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.planning import plan_of

from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.gpus import GPUS
from gasp_fast.planning.memory import memory_by_purpose
from gasp_fast.planning.plan import PAPER_RATE, Plan, tokens_at_rate


def test_checkpointing_saves_memory_and_costs_time() -> None:
    kinds = ("off", "every:4", "every:2", "full")
    plans = [plan_of("model.liger=false", f"train.checkpointing={kind}") for kind in kinds]
    memory, seconds = [p.memory_needed for p in plans], [p.step_seconds for p in plans]
    assert memory == sorted(memory, reverse=True) and seconds == sorted(seconds) and len(set(memory)) == 4
    assert [p.setup.kept_layers for p in plans] == [28, 21, 14, 0]
    assert memory[0] > GPUS["h100"].memory > memory[-1]  # it is why the recipe fits 80 GB


@pytest.mark.parametrize("gpu", sorted(GPUS))
@pytest.mark.parametrize("liger", ["true", "false"])
def test_automatic_checkpointing_keeps_the_most_layers_that_leave_a_margin(gpu: str, liger: str) -> None:
    overrides = ("train.checkpointing=auto", f"model.liger={liger}")
    plan, assumptions = plan_of(*overrides, gpu=gpu), Assumptions()
    allowed = (1 - assumptions.margin) * GPUS[gpu].memory
    assert plan.memory_needed <= allowed and plan.setup.kept_layers > 0
    more = replace(plan.setup, kept_layers=min(28, plan.setup.kept_layers + 1))
    assert more == plan.setup or sum(memory_by_purpose(more, plan.longest, 32, assumptions).values()) > allowed
    fuller = plan_of(*overrides, "train.micro_batch_size=4", gpu=gpu)
    assert fuller.setup.kept_layers < plan.setup.kept_layers
    if fuller.setup.kept_layers:
        assert fuller.memory_needed <= allowed


def test_fused_layers_leave_memory_for_more_kept_layers() -> None:
    fused, plain = (plan_of(f"model.liger={liger}", gpu="h100") for liger in ("auto", "false"))
    assert fused.setup.kept_layers > plain.setup.kept_layers


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 400), more=st.integers(1, 200))
def test_a_higher_rank_needs_more_of_everything(rank: int, more: int) -> None:
    low, high = plan_of(f"lora.rank={rank}"), plan_of(f"lora.rank={rank + more}")
    assert low.memory_needed < high.memory_needed and low.step_seconds < high.step_seconds


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 700), more=st.integers(1, 200))
def test_larger_frames_need_more_of_everything(tokens: int, more: int) -> None:
    low, high = plan_of(frame_tokens=tokens), plan_of(frame_tokens=tokens + more)
    assert low.mean_tokens < high.mean_tokens
    # The working set may fall: fewer layers share a call of the loss then.
    assert low.memory["saved activations"] < high.memory["saved activations"]
    assert low.memory["kept by heads"] <= high.memory["kept by heads"]
    assert low.hours <= high.hours * (1 + 1e-12)  # equal, but for rounding, where the host is slower than either


def test_more_gpus_take_less_time_and_no_fewer_gpu_hours() -> None:
    plans = [plan_of(gpus=gpus) for gpus in (1, 2, 8, 32, 128)]
    assert [p.hours for p in plans] == sorted((p.hours for p in plans), reverse=True)
    assert [p.gpu_hours for p in plans] == sorted(p.gpu_hours for p in plans)


def test_fewer_supervised_layers_make_geometry_cheaper_and_none_make_it_free() -> None:
    shares = [plan_of(f"heads.layers={layers}").geometry_share for layers in ("all", "10-18", "18")]
    assert shares == sorted(shares, reverse=True) and shares[-1] > 0
    assert plan_of("loss.corr_weight=0", "loss.depth_weight=0").geometry_share == 0


def test_no_plan_promises_more_than_the_hardware() -> None:
    for gpu in GPUS:
        assert 0 < plan_of(gpu=gpu).mfu < 0.6


def test_the_tokens_at_the_papers_rate_are_those_at_which_the_plan_reaches_it() -> None:
    def plan_at(tokens: int) -> Plan:
        return plan_of("train.micro_batch_size=4", frame_tokens=tokens)

    most = tokens_at_rate(PAPER_RATE, plan_at)
    assert most is not None and round(PAPER_RATE, 1) == 4.6
    assert plan_at(most).rate >= PAPER_RATE > plan_at(most + 1).rate
    assert tokens_at_rate(1e9, plan_at) is None

"""The estimate of a run moves in the right direction with every setting."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support.planning import plan_of

from gasp_fast.planning.gpus import GPUS
from gasp_fast.planning.plan import PAPER_RATE, tokens_at_rate


def test_checkpointing_saves_memory_and_costs_time() -> None:
    on, off = plan_of(), plan_of("train.checkpointing=off")
    assert on.memory_needed < off.memory_needed and on.step_seconds > off.step_seconds
    assert off.memory_needed > GPUS["h100"].memory > on.memory_needed  # it is why the recipe fits 80 GB


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 400), more=st.integers(1, 200))
def test_a_higher_rank_needs_more_of_everything(rank: int, more: int) -> None:
    low, high = plan_of(f"lora.rank={rank}"), plan_of(f"lora.rank={rank + more}")
    assert low.memory_needed < high.memory_needed and low.step_seconds < high.step_seconds


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 700), more=st.integers(1, 200))
def test_larger_frames_need_more_of_everything(tokens: int, more: int) -> None:
    low, high = plan_of(frame_tokens=tokens), plan_of(frame_tokens=tokens + more)
    assert low.memory_needed < high.memory_needed and low.hours < high.hours and low.mean_tokens < high.mean_tokens


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
    most = tokens_at_rate(PAPER_RATE, lambda tokens: plan_of(frame_tokens=tokens))
    assert most is not None and round(PAPER_RATE, 1) == 4.6
    assert plan_of(frame_tokens=most).rate >= PAPER_RATE > plan_of(frame_tokens=most + 1).rate
    assert tokens_at_rate(1e9, lambda tokens: plan_of(frame_tokens=tokens)) is None

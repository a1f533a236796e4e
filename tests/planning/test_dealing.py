"""The sequences of a step are dealt completely, within the limits, and so that ranks take about equally long."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.planning import setup_of

from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.dealing import DealtStep, Division, deal
from gasp_fast.planning.gpus import GPUS
from gasp_fast.planning.micro_batch_time import MicroBatchSeconds
from gasp_fast.planning.training_setup import SequenceSize

SECONDS = MicroBatchSeconds(setup_of(), GPUS["h200"], Assumptions())
PACKED = MicroBatchSeconds(setup_of("train.packing=true", "train.tokens_at_once=6000"), GPUS["h200"], Assumptions())


def scene(frames: int) -> SequenceSize:
    visual = 100 * frames
    return SequenceSize(frames=frames, tokens=visual + 60, visual=visual, tracked=visual, anchors=40 * frames)


def question(frames: int, text: int, more: int = 100) -> SequenceSize:
    """Its predicted length may be too low by so many tokens."""
    tokens = 100 * frames + text
    return SequenceSize(
        frames=frames, tokens=tokens, visual=100 * frames, labelled=text // 2, most_tokens=tokens + more
    )


sizes = st.one_of(
    st.builds(scene, st.integers(2, 24)),
    st.builds(question, st.integers(0, 16), st.integers(1, 400), st.integers(0, 1500)),
)  # fmt: skip


def assert_complete(dealt: DealtStep, count: int, ranks: int) -> None:
    """Each sequence once, and each rank the same number of micro-batches."""
    assert sorted(place for of_rank in dealt.places for members in of_rank for place in members) == list(range(count))
    assert len(dealt.places) == ranks
    assert {len(of_rank) for of_rank in dealt.places} == {dealt.accumulation}


def assert_limit(dealt: DealtStep, step: list[SequenceSize], division: Division) -> None:
    """No micro-batch of several sequences has more tokens than are allowed."""
    assert division.tokens_at_once is not None
    for places in (places for of_rank in dealt.places for places in of_rank):
        most = [step[place].most_tokens or step[place].tokens for place in places]
        tokens = sum(most) if division.packing else len(most) * max(most, default=0)
        assert tokens <= division.tokens_at_once or len(most) == 1


@settings(max_examples=300, deadline=None)
@given(
    step=st.lists(sizes, min_size=1, max_size=40),
    ranks=st.integers(1, 9),
    limit=st.integers(1, 12_000),
    meets_often=st.booleans(),
    packing=st.booleans(),
)
def test_micro_batches_by_tokens_hold_every_sequence_once_and_keep_the_limit(
    step: list[SequenceSize], ranks: int, limit: int, meets_often: bool, packing: bool
) -> None:
    cost = PACKED if packing else SECONDS
    division = Division(ranks=ranks, tokens_at_once=limit, packing=packing, meets_often=meets_often)
    dealt = deal(step, division, cost)
    assert_complete(dealt, len(step), ranks)
    assert_limit(dealt, step, division)
    for of_rank, seconds in zip(dealt.places, dealt.nanoseconds / 1e9, strict=True):
        for places, predicted in zip(of_rank, seconds, strict=True):
            assert predicted == pytest.approx(cost.of([step[place] for place in places]), abs=1e-7)
    assert 0 < dealt.useful_share <= 1
    assert not (packing and dealt.padding)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), ranks=st.integers(1, 6), each=st.integers(1, 4), size=st.integers(1, 3))
def test_micro_batches_of_a_fixed_size_hold_every_sequence_once(
    data: st.DataObject, ranks: int, each: int, size: int
) -> None:
    count = ranks * each * size
    step = data.draw(st.lists(sizes, min_size=count, max_size=count))
    dealt = deal(step, Division(ranks=ranks, micro_batch_size=size), SECONDS)
    assert_complete(dealt, count, ranks)
    assert {len(members) for of_rank in dealt.places for members in of_rank} == {size}


@pytest.mark.parametrize("packing", [False, True])
def test_ranks_that_exchange_sequences_keep_the_limit(packing: bool) -> None:
    draw = random.Random(0)
    for _ in range(100):
        step = [
            scene(draw.randint(2, 24)),
            *(question(draw.randint(0, 16), 200, draw.randint(0, 3000)) for _ in "12345"),
        ]
        division = Division(ranks=draw.randint(2, 4), tokens_at_once=draw.randint(1_000, 9_000), packing=packing)
        assert_limit(deal(step, division, PACKED if packing else SECONDS), step, division)


def test_four_sequences_on_two_ranks_by_hand() -> None:
    step = [scene(24), scene(8), scene(22), scene(10)]
    dealt = deal(step, Division(ranks=2), SECONDS)
    assert sorted(map(sorted, ([p for m in of_rank for p in m] for of_rank in dealt.places))) == [[0, 1], [2, 3]]
    together = deal(step, Division(ranks=2, meets_often=True), SECONDS)
    assert [sorted(of_rank[n][0] for of_rank in together.places) for n in range(2)] == [[0, 2], [1, 3]]
    one = deal(step, Division(ranks=1, tokens_at_once=5_000), SECONDS)
    assert sorted(map(sorted, one.places[0])) == [[0, 2], [1, 3]]


def test_a_packed_micro_batch_costs_what_its_sequences_cost() -> None:
    members = [scene(20), question(0, 30), question(2, 50)]
    alone = [PACKED.of([size]) - PACKED.by_micro_batch for size in members]
    assert PACKED.of(members) == pytest.approx(sum(alone) + PACKED.by_micro_batch)
    assert PACKED.of(members) < 0.5 * SECONDS.of(members)
    step = [scene(20), *[question(0, 100, more=0)] * 20]
    padded = deal(step, Division(ranks=1, tokens_at_once=4_100), SECONDS)
    packed = deal(step, Division(ranks=1, tokens_at_once=4_100, packing=True), PACKED)
    assert padded.accumulation > packed.accumulation == 1  # 2,060 + 20 * 100 tokens


def test_fewer_sequences_than_ranks_leave_ranks_an_empty_micro_batch() -> None:
    dealt = deal([scene(8), scene(9)], Division(ranks=3, tokens_at_once=10_000), SECONDS)
    assert dealt.places == [[[1]], [[0]], [[]]]
    assert dealt.useful_share == pytest.approx((SECONDS.of([scene(8)]) / SECONDS.of([scene(9)]) + 1) / 3, rel=1e-6)


def test_dealing_depends_on_its_arguments_alone() -> None:
    draw = random.Random(1)
    step = [scene(draw.randint(8, 24)) for _ in range(64)]
    division = Division(ranks=8, tokens_at_once=6_000)
    again = MicroBatchSeconds(setup_of(), GPUS["h200"], Assumptions())
    assert deal(step, division, SECONDS).places == deal(list(step), division, again).places


@pytest.mark.parametrize("division", [Division(ranks=32), Division(ranks=32, tokens_at_once=6_000)])
def test_dealt_ranks_wait_less_than_ranks_that_take_sequences_in_order(division: Division) -> None:
    draw, in_order, dealt = random.Random(0), 0.0, 0.0
    for _ in range(20):
        step = [scene(draw.randint(8, 24)) if draw.random() < 0.5 else question(16, 200) for _ in range(128)]
        loads = [sum(SECONDS.of([size]) for size in step[rank::32]) for rank in range(32)]
        in_order += sum(loads) / 32 / max(loads) / 20
        dealt += deal(step, division, SECONDS).useful_share / 20
    assert in_order < 0.85 and dealt > 0.95

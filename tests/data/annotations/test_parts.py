"""`--shard I/N` splits the shards completely and without overlap."""

from __future__ import annotations

import pytest

from gasp_fast.data.annotations.parts import parse_part, shards_in_part


@pytest.mark.parametrize("step", [1, 2, 3, 10])
def test_the_parts_together_are_all_shards_once(step: int) -> None:
    numbers = [number for first in range(step) for number in shards_in_part(7, parse_part(f"{first}/{step}"))]
    assert sorted(numbers) == list(range(7))


@pytest.mark.parametrize("part", ["1", "2/2", "a/b", "-1/3"])
def test_a_bad_part_is_named(part: str) -> None:
    with pytest.raises(ValueError, match=f"--shard {part}"):
        parse_part(part)


def test_a_part_outside_its_range_is_named() -> None:
    with pytest.raises(ValueError, match="part = 3 of 3"):
        shards_in_part(7, (3, 3))

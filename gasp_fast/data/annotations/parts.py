"""Divides work over the jobs of an array without any communication between them: `--shard I/N`.

Job I of N, counted from 0, takes every N-th piece of a sorted list, from the I-th on. Any N covers all pieces, so an
array of another size may finish what one has begun.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Piece = TypeVar("Piece")
WHOLE = (0, 1)  # the part that is everything
LONGEST_PART = 30  # characters
MOST_GROUPS = 12  # of numbers in a message


def shards_in_part(count: int, part: tuple[int, int]) -> range:
    """Every n-th of `count` shards, for `part = (i, n)`."""
    first, step = part
    if not 0 <= first < step:
        raise ValueError(f"part = {first} of {step}: must lie in 0..{step - 1}")
    return range(first, count, step)


def in_part(pieces: Sequence[Piece], part: tuple[int, int]) -> list[Piece]:
    """Every n-th piece, for `part = (i, n)`."""
    return [pieces[number] for number in shards_in_part(len(pieces), part)]


def parse_part(text: str) -> tuple[int, int]:
    """`"2/8"` → `(2, 8)`."""
    first, slash, step = text.partition("/")
    if len(text) > LONGEST_PART or not (slash and first.isdecimal() and step.isdecimal() and int(first) < int(step)):
        raise ValueError(
            f"--shard {text[:LONGEST_PART]}: give I/N with 0 <= I < N, such as 0/4. I is counted from 0, as by "
            "sbatch --array=0-3"
        )
    return int(first), int(step)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: `[1, 4, 5, 6]` → "1,4-6", as `sbatch --array=` takes them. Long lists are cut."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1][1:] = [number]
        else:
            groups.append([number])
    text = ",".join("-".join(map(str, group)) for group in groups[:MOST_GROUPS])
    return text if len(groups) <= MOST_GROUPS else f"{text},..."

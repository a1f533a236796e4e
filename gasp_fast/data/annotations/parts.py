"""Splits the shards over several jobs: `--part I/N`."""

from __future__ import annotations


def shards_in_part(count: int, part: tuple[int, int]) -> range:
    """Every n-th of `count` shards, for `part = (i, n)`."""
    first, step = part
    if not 0 <= first < step:
        raise ValueError(f"part = {first} of {step}: must lie in 0..{step - 1}")
    return range(first, count, step)


def parse_part(text: str) -> tuple[int, int]:
    """`"2/8"` → `(2, 8)`."""
    first, slash, step = text.partition("/")
    if not (slash and first.isdigit() and step.isdigit() and int(first) < int(step)):
        raise ValueError(f"--part {text}: give I/N with 0 <= I < N, such as 0/4")
    return int(first), int(step)

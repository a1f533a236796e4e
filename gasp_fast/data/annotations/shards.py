"""Which shards one of several cooperating jobs works on: `--part I/N`."""

from __future__ import annotations


def numbers_of_part(count: int, part: tuple[int, int]) -> range:
    """Every n-th of `count` pieces, for `part = (i, n)`."""
    first, step = part
    if not 0 <= first < step:
        raise ValueError(f"part = {first} of {step}: must lie in 0..{step - 1}")
    return range(first, count, step)


def parse_part(text: str) -> tuple[int, int]:
    """`"2/8"` → `(2, 8)`, as it is given on a command line."""
    first, slash, step = text.partition("/")
    if not (slash and first.isdigit() and step.isdigit() and int(first) < int(step)):
        raise ValueError(f"--part {text}: write I/N with 0 <= I < N, such as 0/4")
    return int(first), int(step)

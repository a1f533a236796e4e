"""The order of frame names: numbers in names count as numbers, so `2` comes before `10`."""

from __future__ import annotations

import re

_DIGITS = re.compile(r"([0-9]+)")


def natural_key(name: str) -> tuple[tuple[object, ...], str]:
    """A sorting key. Names whose numbers are padded with zeros to one width keep the order of their characters."""
    parts: list[object] = list(_DIGITS.split(name))  # text and digits by turns
    for at in range(1, len(parts), 2):
        digits = str(parts[at]).lstrip("0")
        parts[at] = (len(digits), digits)  # compares as the number does, of any length
    return tuple(parts), name

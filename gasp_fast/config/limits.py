"""Checks that the whole numbers of a configuration lie in a sensible range.

Beyond it a number is a slip of the keyboard. Found late, it costs a model that was built in vain or all memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MOST = 1_000_000  # of anything that is counted in a configuration
LARGEST_SEED = (1 << 32) - 1  # NumPy's generators take no larger one


def check_whole(config: Any, names: Iterable[str], group: str = "", least: int = 1, most: int = MOST) -> None:
    """Raise unless each of the whole numbers `names` of `config` lies in `least` to `most`, or is None.

    `group` is what the error writes before the name: `train.` for the keys of train.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{group}{name} = {value} must be {f'at least {least}' if least else '0 or more'}")
        if value is not None and value > most:
            raise ValueError(f"{group}{name} = {value} must be at most {most:,}")

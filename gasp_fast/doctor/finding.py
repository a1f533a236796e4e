"""What a check says about one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "broken"]
OK: State = "ok"
MISSING: State = "missing"  # not there, and nothing that is there needs it
BROKEN: State = "broken"  # there, and does not work; or needed by everything, and not there


@dataclass(frozen=True)
class Finding:
    state: State
    name: str
    found: str
    cure: str = ""  # the command that mends it; empty where there is nothing to mend, or no command does it


def told(error: BaseException) -> str:
    """An error in one line, short enough to stand in a list."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__

"""`Finding`: the result of one check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "broken"]
OK: State = "ok"
MISSING: State = "missing"  # not installed, and optional
BROKEN: State = "broken"  # installed but does not work, or required and not installed


@dataclass(frozen=True)
class Finding:
    state: State
    name: str
    found: str
    cure: str = ""  # the command that fixes it; empty if nothing is wrong, or if no command fixes it

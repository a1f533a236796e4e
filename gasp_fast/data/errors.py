"""One-line messages: for damaged files, and for a folder that was made with other settings."""

from __future__ import annotations

from typing import Any


def one_line(error: BaseException) -> str:
    """The message of `error` without line breaks, or its type where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def difference(old: Any, new: Any, name: str = "settings") -> str:
    """The first difference between two settings, in words; empty if they are equal."""
    pairs: list[tuple[Any, Any, str]] = []
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(old.get(key), new.get(key), key) for key in {**old, **new}]
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        if len(old) != len(new):
            return f"{name}: {len(old)} there, {len(new)} now"
        pairs = [(a, b, name) for a, b in zip(old, new, strict=True)]
    elif old != new:
        return f"{name}: {old} there, {new} now"
    return next((change for pair in pairs if (change := difference(*pair))), "")

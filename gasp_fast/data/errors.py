"""One-line messages for damaged files."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """The message of `error` without line breaks, or its type where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__

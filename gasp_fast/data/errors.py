"""One-line messages: for damaged files, and for a folder that was made with other settings."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gasp_fast.files import one_line as one_line

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: Any) -> str:
    """`value` for a message: long and deeply nested values are shortened."""
    return _SHORT.repr(value)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a decoder raises inside the block into a one-line `OSError` that names the file and `what` it is.

    On damaged files the libraries raise anything from SyntaxError to MemoryError. Only regular files are read: a named
    pipe or a device may never end.
    """
    try:
        if not path.is_file():
            raise OSError("missing, or not a regular file")
        yield
    except Exception as error:
        raise OSError(f"{path}: cannot read {what}: {one_line(error)}") from error


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
        return f"{name}: {shown(old)} there, {shown(new)} now"
    return next((change for pair in pairs if (change := difference(*pair))), "")

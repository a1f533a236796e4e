"""Atomic writes: a file never holds part of its new content, even if the process is killed while it writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`. It replaces `path` after the block; if the block raises, it is deleted."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content`; afterwards `path` holds either what it held before or all of `content`."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def sweep_partials(path: Path) -> None:
    """Delete the temporary files that killed processes left of `path`. Call it before writing `path`."""
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        partial.unlink(missing_ok=True)

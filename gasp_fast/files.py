"""Atomic writes: a file or folder never holds part of its new content, even if the writing process is killed."""

from __future__ import annotations

import os
import shutil
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


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder beside `folder`. It becomes `folder` after the block; if the block raises, it is deleted."""
    for leftover in folder.parent.glob(f".{folder.name}.*.partial"):  # of killed processes
        shutil.rmtree(leftover, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sweep_partials(path: Path) -> None:
    """Delete the temporary files that killed processes left of `path`. Call it before writing `path`."""
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        partial.unlink(missing_ok=True)

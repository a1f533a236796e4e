"""Atomic writes, JSON from files that are not trusted, and errors in one line.

A file or folder never holds part of its new content, even if the writing process is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LONGEST = 500  # characters of a message: a library may quote a whole file
LARGEST_JSON = 1 << 28  # bytes; parsed, JSON takes some ten times as much memory


def one_line(error: BaseException) -> str:
    """The message of `error` without line breaks, shortened, or its type where it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def read_json(path: Path, largest: float = LARGEST_JSON) -> Any:
    """The content of a JSON file. One that is damaged, too large or nested too deep is a one-line `ValueError`."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a named pipe or a device may never end
        raise OSError(f"{path}: not a regular file")
    if status.st_size > largest:
        raise ValueError(f"{path}: {status.st_size:,} bytes of JSON; at most {largest:,} are read")
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, name: str) -> Any:
    """The value of a JSON text; `name` stands in the error."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from error


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
    folder = folder.resolve()  # a link stays; the folder that it names is replaced
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

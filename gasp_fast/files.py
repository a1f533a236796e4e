"""Atomic writes, JSON from files that are not trusted, and errors in one line.

A file or folder never holds part of its new content, even if the writing process is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; none if there is no file. A killed process leaves half a line: left out."""
    if not path.exists():
        return []
    if not path.is_file():
        raise OSError(f"{path}: not a regular file")
    objects = []
    for line in path.read_bytes().splitlines():
        try:
            value = parse_json(line, str(path))
        except ValueError:
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects


def append(path: Path, text: str) -> None:
    with _named(path), open(path, "a") as file:
        file.write(text)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let errors of writing say which file: that a disk is full, Python reports without a name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise OSError(f"{path} cannot be written: {error.strerror}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`. It replaces `path` after the block; if the block raises, it is deleted."""
    partial = _partial(path)
    try:
        with _named(path):
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


def create_atomically(path: Path, content: bytes) -> None:
    """Write `content`, unless `path` exists. Of several processes that call this at the same time, one writes."""
    partial = _partial(path)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """A temporary name beside `path`. The process number is not enough: containers number their processes alike."""
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")


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


def share_as(like: Path) -> None:
    """Give all files beside `like` and below its permissions. safetensors makes its own unreadable for others."""
    mode = stat.S_IMODE(like.stat().st_mode)
    for path in like.parent.rglob("*"):
        if path.is_file():
            with suppress(OSError):  # some file systems have no permissions
                path.chmod(mode)

"""The manifest of a checkpoint: name, size and SHA-256 of every file, so that damage is noticed before use."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .files import read_json, write_atomically

MANIFEST = "manifest.json"  # {"files": {name: {"bytes": size, "sha256": digest}}}
_BLOCK = 1 << 22  # bytes read at once
_THREADS = 8  # that hash files; hashlib releases the interpreter's lock


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files in `folder`. Afterwards all of it is on the disk, not only in memory."""
    names = _file_names(folder)
    for name in names:
        _sync(folder / name)
    digests = _digests(folder / name for name in names)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }
    write_atomically(folder / MANIFEST, (json.dumps({"files": files}, indent=1) + "\n").encode())
    for inner in {(folder / name).parent for name in names} | {folder}:
        _sync(inner)


def damage(folder: Path) -> str | None:
    """What differs from the manifest, in words; None if nothing does, or if there is no manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        files = read_json(path)["files"]
        expected = {str(name): (int(fact["bytes"]), str(fact["sha256"])) for name, fact in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    found = set(_file_names(folder))
    if gone := sorted(expected.keys() - found):
        return f"{gone[0]} is missing"
    if foreign := sorted(found - expected.keys()):
        return f"{foreign[0]} was not saved with it"
    names = sorted(expected)
    try:
        for name in names:
            if (size := (folder / name).stat().st_size) != expected[name][0]:
                return f"{name} has {size:,} bytes instead of {expected[name][0]:,}"
        for name, digest in zip(names, _digests(folder / name for name in names), strict=True):
            if digest != expected[name][1]:
                return f"{name} has other content than was saved"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None


def _file_names(folder: Path) -> list[str]:
    """All regular files but the manifest, relative to `folder`. Hidden ones belong to file systems, not to us."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) != MANIFEST)


def _digests(paths: Iterable[Path]) -> list[str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    digest, block = hashlib.sha256(), bytearray(_BLOCK)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)

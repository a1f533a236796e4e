"""`SceneFolder`: which files a scene has, and whether a path leads out of it, from one listing of each folder.

A scene has hundreds of files, a library thousands of scenes, and on a network file system every call takes a
millisecond. So nothing here calls the file system for a single file: a folder is listed once, and its listing also says
which entries are regular files and which are links. Only links are followed one by one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from gasp_fast.data.errors import one_line, shown

LONGEST_NAME = 255  # bytes of a file or folder name on ordinary file systems
DEEPEST = 32  # folders below the root that are looked up one in the other
# Folders out of the scenes into which links may lead, while `following` is in effect.
_FOLLOWED: ContextVar[tuple[str, ...]] = ContextVar("followed", default=())
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


@contextmanager
def following(folders: Sequence[Path]) -> Iterator[None]:
    """Links out of a scene that lead into one of `folders` are followed inside the block."""
    token = _FOLLOWED.set(tuple(os.path.realpath(folder) for folder in folders))
    try:
        yield
    finally:
        _FOLLOWED.reset(token)


@dataclass(frozen=True)
class _Listing:
    real: str  # path of the folder with every `..` and link resolved
    inside: bool  # whether that lies in the scene, or where links may lead
    entries: Mapping[str, os.DirEntry[str]]  # by name; empty if the folder does not exist, or lies outside


class SceneFolder:
    """The files below `root`, as they are when their folder is first looked up. Make a new one for each reading."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._root = str(root)
        self._real_root = os.path.realpath(root)
        self._below_root = os.path.join(self._root, ""), os.path.join(self._real_root, "")
        self._allowed = (self._real_root, *_FOLLOWED.get())
        self._listings: dict[str, _Listing] = {}

    def is_file(self, path: Path) -> bool:
        """Whether `path` is a regular file, or a link to one."""
        folder, name = os.path.split(path)
        listing = self._listing(folder)
        if not listing.inside:
            return os.path.isfile(path)
        entry = listing.entries.get(name)
        try:
            return entry is not None and entry.is_file()
        except OSError:  # a link to itself
            return False

    def is_dir(self, path: Path) -> bool:
        """Whether `path` is a folder, or a link to one."""
        folder, name = os.path.split(path)
        listing = self._listing(folder)
        if not listing.inside:
            return os.path.isdir(path)
        entry = listing.entries.get(name)
        try:
            return entry is not None and entry.is_dir()
        except OSError:
            return False

    def names(self, folder: Path) -> list[str]:
        """The names in a folder, sorted; none if it does not exist. A folder out of the scene is an error."""
        return sorted(self._listing(str(self.inside(folder))).entries)

    def inside(self, path: Path) -> Path:
        """`path` if it lies in the scene with every `..` and link resolved; otherwise an error that names it."""
        try:
            folder, name = os.path.split(path)
            _check_name(name)
            listing = self._listing(folder)
            entry = listing.entries.get(name)
            if listing.inside and name != ".." and (entry is None or not entry.is_symlink()):
                return path
            real = os.path.realpath(path)
        except ValueError as error:
            raise ValueError(f"{self.root}: {shown(str(path))} is not a path: {one_line(error)}") from error
        if not self._contains(real):
            raise ValueError(
                f"{path}: leads out of the scene folder {self.root}; put the file itself inside, or allow "
                "its folder in follow_links of a library.json"
            )
        return path

    def _contains(self, real: str) -> bool:
        return any(real == root or real.startswith(os.path.join(root, "")) for root in self._allowed)

    def _listing(self, folder: str) -> _Listing:
        listing = self._listings.get(folder)
        if listing is None:
            real, exists = self._locate(folder)
            inside = self._contains(real)
            listing = self._listings[folder] = _Listing(real, inside, _entries(folder) if inside and exists else {})
        return listing

    def _locate(self, folder: str) -> tuple[str, bool]:
        """The real path of `folder`, and whether it may exist."""
        if folder == self._root:
            return self._real_root, True
        parent, name = os.path.split(folder)
        below = folder.startswith(self._below_root[0])
        if not below or name in ("", ".", "..") or folder.count(os.sep, len(self._root)) > DEEPEST:
            for part in folder.split(os.sep):
                _check_name(part)
            return os.path.realpath(folder), True
        _check_name(name)
        above = self._listing(parent)
        entry = above.entries.get(name)
        if not above.inside or (entry is not None and entry.is_symlink()):
            return os.path.realpath(folder), True
        return os.path.join(above.real, name), entry is not None


def _entries(folder: str) -> dict[str, os.DirEntry[str]]:
    try:
        with os.scandir(folder or os.curdir) as entries:
            return {entry.name: entry for entry in entries}
    except OSError as error:
        if error.errno in _MISSING:
            return {}
        raise


def _check_name(name: str) -> None:
    """Raises for a name that no file can have; for half of a surrogate pair, from JSON, `fsencode` does."""
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise ValueError("name too long")
    if "\0" in name:
        raise ValueError("embedded null byte")

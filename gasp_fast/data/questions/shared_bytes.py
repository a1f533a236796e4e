"""Bytes that loader workers read in the memory of the process that started them, instead of copying them.

They lie in a file without a name, in memory (where the system has no such files, on a disk). A worker that is started
receives the open file and maps it. The memory is freed when the last of these processes ends, however it ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any


class SharedBytes:
    """A read-only block of bytes. `parts` are written one after another."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        opened = _new_file()
        with os.fdopen(opened, "wb", closefd=False) as file:
            for part in parts:
                file.write(part)
            size = file.tell()
        self._map(opened, size)

    def _map(self, opened: int, size: int) -> None:
        self._opened, self._size = opened, size
        self._bytes = mmap.mmap(opened, size, prot=mmap.PROT_READ) if size else b""
        weakref.finalize(self, os.close, opened)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        return self._bytes[part]

    def view(self) -> memoryview:
        return memoryview(self._bytes)

    def __getstate__(self) -> tuple[Any, int] | bytes:
        """The open file, if a process is being started; otherwise, as where objects are sent or copied, the bytes."""
        return self[:] if get_spawning_popen() is None else (reduction.DupFd(self._opened), self._size)

    def __setstate__(self, state: tuple[Any, int] | bytes) -> None:
        if isinstance(state, bytes):
            SharedBytes.__init__(self, [state])
        else:
            self._map(state[0].detach(), state[1])


def _new_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("questions")
    with tempfile.TemporaryFile() as file:  # without a name, but on a disk
        return os.dup(file.fileno())

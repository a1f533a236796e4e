"""Worker processes read the same bytes without a copy of their own, and nothing is left when they have ended."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from gasp_fast.data.questions.shared_bytes import SharedBytes

BLOCK = os.urandom(1 << 20)


def anonymous_memory() -> int:
    """Bytes of this process that are of no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def mapped_files() -> set[str]:
    """The inodes of the nameless files that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:questions" in line}


def read(shared: SharedBytes, answers: Connection) -> None:
    answers.send((sha256(shared.view()).hexdigest(), shared[3:9], mapped_files(), anonymous_memory()))


def in_a_process(shared: SharedBytes, method: str) -> tuple[str, bytes, set[str], int]:
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    process = context.Process(target=read, args=(shared, there))
    process.start()
    answer: tuple[str, bytes, set[str], int] = here.recv()
    process.join()
    return answer


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_worker_reads_the_bytes_and_holds_no_copy(method: str) -> None:
    large, small = SharedBytes([BLOCK] * 64), SharedBytes([BLOCK[:10], b""])
    digest, part, mapped, memory = in_a_process(large, method)
    assert digest == sha256(BLOCK * 64).hexdigest() and part == BLOCK[3:9]
    assert mapped and mapped <= mapped_files()
    *_, least = in_a_process(small, method)
    assert memory - least < 8 << 20


def test_sent_and_copied_they_are_the_same_bytes() -> None:
    shared = SharedBytes([b"one", b"", b"two"])
    for other in (pickle.loads(pickle.dumps(shared)), copy.deepcopy(shared)):
        assert other[:] == b"onetwo" and len(other) == 6 and other[2:4] == b"et"
    assert len(SharedBytes([])) == 0 and SharedBytes([])[:] == b""


def test_no_file_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        SharedBytes([b"x"])
    assert len(os.listdir("/proc/self/fd")) == before

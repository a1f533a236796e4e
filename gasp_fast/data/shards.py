"""Work in pieces by several processes, and files that are there whole or not at all. Knows nothing of the contents."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def write_atomically(path: Path, content: bytes) -> None:
    """The old file or the new one, whatever happens."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sweep_partials(path: Path) -> None:
    """Removes what killed processes left of `path`; for the one who is about to write it."""
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        partial.unlink(missing_ok=True)


def numbers_of_part(count: int, part: tuple[int, int]) -> range:
    """Every n-th of `count` pieces, for `part = (i, n)`."""
    first, step = part
    if not 0 <= first < step:
        raise ValueError(f"part = {first} of {step}: must lie in 0..{step - 1}")
    return range(first, count, step)


def parse_part(text: str) -> tuple[int, int]:
    """`"2/8"` → `(2, 8)`, as it is given on a command line."""
    first, slash, step = text.partition("/")
    if not (slash and first.isdigit() and step.isdigit() and int(first) < int(step)):
        raise ValueError(f"--part {text}: write I/N with 0 <= I < N, such as 0/4")
    return int(first), int(step)


def usable_cores() -> int:
    """As many as this process may run on: fewer than the machine has, where a scheduler says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], workers: int
) -> Iterator[tuple[Piece, Result]]:
    """Calls `work` (a picklable callable) on each piece, and yields the piece and its result as they are done.

    The first error stops everything. One worker, or one piece, runs right here.
    """
    if workers <= 1 or len(pieces) <= 1:
        for piece in pieces:
            yield piece, work(piece)
        return
    # Fresh interpreters: a fork would copy whatever threads and locks the caller has.
    context = multiprocessing.get_context("spawn")
    count = min(workers, len(pieces))
    with _one_thread_a_worker(), ProcessPoolExecutor(count, context, initializer=_end_with_parent) as pool:
        waiting = iter(pieces)
        running: dict[Future[Result], Piece] = {}
        try:
            while True:
                # A short queue: a million pieces submitted at once would cost more memory than the pieces.
                for piece in islice(waiting, 2 * workers - len(running)):
                    running[pool.submit(work, piece)] = piece
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
        except BrokenProcessPool:
            raise OSError("a worker process was killed, perhaps for want of memory; try fewer of them") from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_a_worker() -> Iterator[None]:
    """Workers have a core each. NumPy would start as many threads as there are cores, in every one of them."""
    names = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"} - os.environ.keys()
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next piece for ever; this one ends too."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

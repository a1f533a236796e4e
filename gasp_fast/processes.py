"""Worker processes: how many cores there are, work split over them, and an end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")


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

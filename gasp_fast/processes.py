"""Processor, cores and packages of this machine; work in worker processes, which end with their parent; time limits."""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures import TimeoutError as FuturesTimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.metadata import Distribution
from itertools import islice
from typing import TypeVar

MOST_WORKERS = 1024
_IMPORTED = time.monotonic()

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Number of cores that this process may run on: fewer than the machine has where a scheduler limits it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(workers: int, option: str) -> None:
    """Raise where `--workers` is no sensible number of processes or threads."""
    if not 1 <= workers <= MOST_WORKERS:
        raise ValueError(f"{option} {workers}: 1 to {MOST_WORKERS:,} processes")


def processor_name() -> str:
    return proc_line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def proc_line(file: str, key: str) -> str | None:
    """The text after `key:` in a file of /proc; None if there is none."""
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
    except OSError:
        return None


def versions(*packages: str) -> dict[str, str | None]:
    """The installed version of each package; None where it is not installed."""
    installed = {name: next(iter(Distribution.discover(name=name)), None) for name in packages}
    return {name: distribution.version if distribution else None for name, distribution in installed.items()}


def print_anything() -> None:
    """Escape characters that a terminal does not have, instead of raising: printing must not make a result an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def process_age() -> float:
    """Seconds since this process was started, the imports included; without /proc, since this module was imported."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.monotonic() - _IMPORTED


def in_processes(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], workers: int
) -> Iterator[tuple[Piece, Result]]:
    """Call `work` (a picklable callable) on each piece and yield (piece, result) as results arrive.

    The first error stops everything. One worker, or one piece, runs in this process.
    """
    if workers <= 1 or len(pieces) <= 1:
        for piece in pieces:
            yield piece, work(piece)
        return
    # New interpreters: a fork would copy the caller's threads and locks.
    context = multiprocessing.get_context("spawn")
    count = min(workers, len(pieces))
    executor = ProcessPoolExecutor(count, context, initializer=end_with_parent, initargs=(os.getpid(),))
    with _one_thread_a_worker(), executor as pool:
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
            raise OSError("a worker process was killed, probably out of memory; use fewer workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_a_worker() -> Iterator[None]:
    """Workers get one thread each, unless the environment says otherwise: NumPy would start one for every core."""
    names = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"} - os.environ.keys()
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def in_time(work: Callable[[], Result], seconds: float) -> Result:
    """The result or the exception of `work`; a `TimeoutError` if it has neither after `seconds`.

    A thread cannot be killed: one that is late is abandoned.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    # Not an executor: its threads are not daemons, so a stuck one would block the exit.
    threading.Thread(target=run, name="in_time", daemon=True).start()
    try:
        return future.result(seconds)
    except FuturesTimeoutError as error:  # before Python 3.11 not the built-in one
        raise TimeoutError(str(error)) from None


def end_with_parent(parent: int) -> None:
    """End this process within a second of the end of its parent, the process number `parent`.

    A killed parent cannot stop its children: a worker would wait for its next piece for ever, and the ranks of a killed
    launcher would train on beside the run that follows.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

"""Work in numbered pieces, each one file, by several processes: whole or not at all. Knows nothing of the contents."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from pathlib import Path


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


def in_processes(work: Callable[[int], None], numbers: Sequence[int], workers: int) -> Iterator[int]:
    """Calls `work` (a picklable callable) on each number and yields the numbers as they are done.

    The first error stops everything. One worker, or one number, runs right here.
    """
    if workers <= 1 or len(numbers) <= 1:
        for number in numbers:
            work(number)
            yield number
        return
    # Fresh interpreters: a fork would copy whatever threads and locks the caller has.
    with ProcessPoolExecutor(min(workers, len(numbers)), mp_context=get_context("spawn")) as pool:
        waiting = iter(numbers)
        running: dict[Future[None], int] = {}
        try:
            while True:
                # A short queue: a million pieces submitted at once would cost more memory than the pieces.
                for number in islice(waiting, 2 * workers - len(running)):
                    running[pool.submit(work, number)] = number
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    number = running.pop(done)
                    done.result()
                    yield number
        finally:
            pool.shutdown(cancel_futures=True)

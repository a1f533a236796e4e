"""How far a long command is: a bar on a terminal, a line a minute in the log of a job."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Piece = TypeVar("Piece")
LINE_EVERY = 60.0  # seconds between lines where there is no terminal


def progress(pieces: Iterable[Piece], total: int, what: str) -> Iterator[Piece]:
    """Yields the pieces and shows how many there have been."""
    with Steps(what, total) as steps:
        for piece in pieces:
            yield piece
            steps.advance()


class Steps:
    """Shows how far it is: a bar on a terminal, else a line a minute, as in the log of a job."""

    def __init__(self, what: str, total: int, console: Console | None = None) -> None:
        self.what, self.total, self.done = what, total, 0
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, *times, console=console or Console(), transient=True)
        self.task = self.bar.add_task(what, total=total)

    def __enter__(self) -> Steps:
        self.began = self.shown = time.monotonic()
        if self.bar.console.is_terminal:
            self.bar.start()
        return self

    def advance(self) -> None:
        self.to(self.done + 1)

    def to(self, done: int) -> None:
        self.done = done
        self.bar.update(self.task, completed=self.done)
        now = time.monotonic()
        if not self.bar.console.is_terminal and now - self.shown >= LINE_EVERY:
            left = (now - self.began) / self.done * (self.total - self.done)
            print(f"{self.what}: {self.done:,} of {self.total:,}, about {duration(left)} left", flush=True)
            self.shown = now

    def __exit__(self, *_: object) -> None:
        if self.bar.console.is_terminal:
            self.bar.stop()


def duration(seconds: float) -> str:
    """`7500` → "2.1 h"."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"

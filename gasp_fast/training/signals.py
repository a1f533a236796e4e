"""Signals that end a run early: the step in hand is finished and saved, and the same command continues the run.

The first signal is noted. The ranks share it with the numbers of each step (`loop.py`), so all stop after the same step
even if it reached one of them only. Before the first step there is nothing to save, and the process ends at once. So it
does at a second signal.

Threads see signals even while the main thread waits for a GPU or for another rank: Python's C handler writes each
signal's number into a pipe, which a thread reads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
INTERRUPTED = 75  # exit code: ended by a signal, nothing lost, start again (EX_TEMPFAIL of sysexits.h)
COPIES = 2.0  # seconds in which a launched process gets copies of a signal: from the terminal, Slurm and the launcher


class Interrupted(Exception):
    """A signal ended the run. Its state is saved."""


class StopSignals:
    """Notes the first of `SIGNALS` while it is entered; `received` is its number, 0 before."""

    def __init__(self, launched: bool = False) -> None:
        self.received = 0
        self.step_in_hand = False  # set by the loop: from now on the first signal waits for the end of a step
        self._copies = COPIES if launched else 0.0
        self._first = 0.0  # when the first signal came
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._previous = {number: signal.signal(number, _only_the_pipe) for number in SIGNALS}
            self._previous_pipe = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous:
            for number, handler in self._previous.items():  # late copies must not change the exit code
                signal.signal(number, signal.SIG_IGN if self.received else handler)
            signal.set_wakeup_fd(self._previous_pipe)
            os.close(self._writer)  # ends the thread

    def _watch(self, reader: int) -> None:
        while byte := os.read(reader, 1):
            if byte[0] in SIGNALS:
                self._take(signal.Signals(byte[0]))
        os.close(reader)

    def _take(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if not self.step_in_hand:
            if int(os.environ.get("RANK", 0)) == 0:
                line = f"gasp_fast.train: {number.name} before the first step; nothing to save; start the command again"
                print(line, file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
        if not self.received:
            self.received, self._first = number, now
        elif now - self._first >= self._copies:
            os._exit(128 + number)


def _only_the_pipe(number: int, frame: FrameType | None) -> None:
    """A handler must be set for the number to be written into the pipe."""


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes started within never receive `SIGNALS`, which Slurm and terminals send to every process of a job.

    Loader workers must outlast the step in hand. They end with the trainer.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # unblocks two of them when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_trainer(worker: int) -> None:
    """End this loader worker when its trainer ends, however that ends.

    A worker's parent is the fork server, which lives as long as any worker does, so torch's own watch for the parent
    never sees a killed trainer.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def watch() -> None:
        trainer.join()
        os._exit(1)

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # A thread that hands tensors over may see the end of the trainer first: as a broken connection.
        if isinstance(error, ConnectionError | EOFError):
            trainer.join(1.0)
            if not trainer.is_alive():
                os._exit(1)
        sys.__excepthook__(kind, error, trace)

    threading.Thread(target=watch, daemon=True).start()
    sys.excepthook = report

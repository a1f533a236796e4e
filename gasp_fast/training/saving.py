"""Writes the checkpoints of a run, whatever number of processes it has and however they divide the state.

With `run.save_async` training waits only until the state is copied into the memory of the first process, where a thread
writes it. One checkpoint is written at a time: the next one waits for it. That it cannot be written is found out after
one of the next steps, on all processes, and ends the run.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from gasp_fast.config.loader import to_yaml
from gasp_fast.files import one_line, write_atomically
from gasp_fast.run_folder import ABOUT, CONFIG

from .checkpoints import complete_or_absent, rotate
from .config import TrainConfig
from .distributed import Processes
from .guards import GuardError, check_disk
from .state import Snapshot


class CheckpointWriter:
    """Writes the checkpoints of a run and removes those that are no longer needed.

    While it is entered, a checkpoint may be in the course of being written; at the exit all are complete.
    """

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        self.config, self.run, self.processes = config, config.run, processes
        self.out = Path(config.run.out)
        self.thread = ThreadPoolExecutor(1, "checkpoints")  # started when it has work
        self.writing: Future[Exception | None] | None = None  # only on the first process

    def save(self, step: int, snapshot: Snapshot, about: dict[str, Any]) -> None:
        """Write `checkpoint-STEP`, or begin to. All processes must call; an error of the first one is raised on all."""
        self.finish()
        folder, first = self.out / f"checkpoint-{step}", self.processes.first
        if self.run.save_async:
            snapshot = snapshot.in_memory(first)
            if first:
                self.writing = self.thread.submit(self._write, folder, snapshot, about)
            return
        error = self._write(folder, snapshot, about) if first else None
        snapshot.take_part()
        self._raise_on_all(error)

    @property
    def failed(self) -> bool:
        """Whether the checkpoint of the thread could not be written, as far as is known by now."""
        return self.writing is not None and self.writing.done() and self.writing.result() is not None

    def finish(self) -> None:
        """Wait until all is written. All processes must call; an error is raised on all."""
        if self.run.save_async:
            error = self.writing.result() if self.writing is not None else None
            self.writing = None
            self._raise_on_all(error)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.thread.shutdown()
        if error is None:
            self.finish()

    def _raise_on_all(self, error: Exception | None) -> None:
        self.processes.decided_by_first(partial(_raise, error))

    def _write(self, folder: Path, snapshot: Snapshot, about: dict[str, Any]) -> Exception | None:
        """Write a checkpoint; returns what kept it from being written."""
        try:
            with complete_or_absent(folder) as unfinished:
                snapshot.write(unfinished)
                write_atomically(unfinished / CONFIG, to_yaml(self.config).encode())
                write_atomically(unfinished / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
            rotate(self.out, self.run.keep, self.run.keep_best)
            if about["step"] < about["steps"]:
                check_disk(self.run)  # only now that what has been trained is saved
        except GuardError as error:
            return GuardError(f"{error}; {folder} is complete, and the same command continues from it")
        except (OSError, SafetensorError) as error:
            return OSError(f"{folder} cannot be written: {one_line(error)}")
        return None


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error

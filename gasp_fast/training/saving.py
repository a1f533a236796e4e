"""Writes the checkpoints of a run, whatever number of processes it has and however they divide the state.

Each process writes its share. With `run.save_async` training waits only until the shares are copied into host memory,
where threads write them. One checkpoint is written at a time: the next one waits for it. That it cannot be written is
found out after one of the next steps, on all processes, and ends the run.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from gasp_fast.config.loader import to_yaml
from gasp_fast.files import one_line, write_atomically
from gasp_fast.run_folder import ABOUT, CONFIG

from .checkpoints import begin, complete_or_absent, rotate
from .distributed import Processes
from .guards import GuardError, check_disk
from .state import Snapshot


class CheckpointWriter:
    """Writes the checkpoints of a run and removes those that are no longer needed.

    While it is entered, a checkpoint may be in the course of being written; at the exit all are complete.
    """

    def __init__(self, config: Any, processes: Processes) -> None:
        self.config, self.run, self.processes = config, config.run, processes
        self.out = Path(config.run.out)
        self.thread = ThreadPoolExecutor(1, "checkpoints")  # started when it has work
        self.writing: Future[Exception | None] | None = None
        self.group = processes.file_group(config.run.timeout)

    def save(self, step: int, snapshot: Snapshot, about: dict[str, Any]) -> None:
        """Write `checkpoint-STEP`, or begin to. All processes must call; an error of the first one is raised on all."""
        self.finish()
        folder = self.out / f"checkpoint-{step}"
        unfinished = self.processes.decided_by_first(partial(_begin, folder))
        if self.run.save_async:
            self.writing = self.thread.submit(self._write, unfinished, folder, snapshot, about)
        else:
            self._raise_on_all(self._write(unfinished, folder, snapshot, about))

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

    def _write(self, unfinished: Path, folder: Path, snapshot: Snapshot, about: dict[str, Any]) -> Exception | None:
        """Write a checkpoint, or a share of it; returns what kept it from being written."""
        first = self.processes.first
        try:
            with complete_or_absent(unfinished, folder) if first else nullcontext():
                snapshot.write(unfinished, self.group, first)
                if first:
                    write_atomically(unfinished / CONFIG, to_yaml(self.config).encode())
                    write_atomically(unfinished / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
            if first:
                rotate(self.out, self.run.keep, self.run.keep_best)
                if about["step"] < about["steps"]:
                    check_disk(self.run)  # only now that what has been trained is saved
        except GuardError as error:
            return GuardError(f"{error}; {folder} is complete, and the same command continues from it")
        except (OSError, SafetensorError) as error:
            return _not_written(folder, error)
        return None


def _begin(folder: Path) -> Path:
    try:
        return begin(folder)
    except OSError as error:
        raise _not_written(folder, error) from error


def _not_written(folder: Path, error: Exception) -> OSError:
    return OSError(f"{folder} cannot be written: {one_line(error)}")


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error

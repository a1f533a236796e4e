"""Writes the checkpoints of a run, whatever number of processes it has and however they divide the state."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
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
    """Writes the checkpoints of a run and removes those that are no longer needed."""

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        self.config, self.run, self.processes = config, config.run, processes
        self.out = Path(config.run.out)

    def save(self, step: int, snapshot: Snapshot, about: dict[str, Any]) -> None:
        """Write `checkpoint-STEP`. All processes must call; an error of the first one is raised on all."""
        error = None
        if self.processes.first:
            error = self._write(self.out / f"checkpoint-{step}", snapshot, about)
        snapshot.take_part()
        self.processes.decided_by_first(partial(_raise, error))

    def _write(self, folder: Path, snapshot: Snapshot, about: dict[str, Any]) -> Exception | None:
        """Write a checkpoint; returns what kept it from being written."""
        try:
            check_disk(self.run)
            with complete_or_absent(folder) as unfinished:
                snapshot.write(unfinished)
                write_atomically(unfinished / CONFIG, to_yaml(self.config).encode())
                write_atomically(unfinished / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
            rotate(self.out, self.run.keep, self.run.keep_best)
        except GuardError as error:
            return error
        except (OSError, SafetensorError) as error:
            return OSError(f"{folder} cannot be written: {one_line(error)}")
        return None


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error

"""The random number generators of all processes in a checkpoint.

    random.safetensors    RANK.cpu, RANK.cuda: torch's; `by_rank` in its metadata: Python's and NumPy's, as JSON

With another number of processes each takes the state of rank modulo the saved number. Only the masks of dropout depend
on it: they are others than if the run had gone on as before.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .distributed import Processes

FILE = "random.safetensors"
State = dict[str, Any]


def gathered_random_states(processes: Processes) -> list[State]:
    """The states of all processes. All must call."""
    legacy: Any = np.random.get_state()
    own = {
        "python": list(random.getstate()),
        "numpy": [value.tolist() if isinstance(value, np.ndarray) else value for value in legacy],
        "cpu": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(processes.device) if processes.device.type == "cuda" else None,
    }
    return processes.from_all(own)


def write_random_states(folder: Path, states: list[State]) -> None:
    tensors = {f"{rank}.{name}": state[name] for rank, state in enumerate(states) for name in ("cpu", "cuda")}
    # One entry: safetensors writes several in any order, and then equal states would not be equal files.
    by_rank = {"by_rank": json.dumps([[state["python"], state["numpy"]] for state in states])}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / FILE, by_rank)


def read_random_state(folder: Path, processes: Processes) -> None:
    """Restore the generators of this process."""
    with safe_open(folder / FILE, "pt") as file:
        by_rank = json.loads(file.metadata()["by_rank"])
        rank = processes.rank % len(by_rank)
        (version, numbers, gauss), (kind, keys, *rest) = by_rank[rank]
        cpu = file.get_tensor(f"{rank}.cpu").clone()
        cuda = file.get_tensor(f"{rank}.cuda").clone() if f"{rank}.cuda" in file.keys() else None  # noqa: SIM118
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.random.set_rng_state(cpu)
    if cuda is not None and processes.device.type == "cuda":
        torch.cuda.set_rng_state(cuda, processes.device)

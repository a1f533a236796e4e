"""Who this process is among all, how they reach each other, and what DeepSpeed is told. Knows no model.

The same command line runs alone, under torchrun and under the deepspeed launcher; all three announce themselves in
the environment. Without a GPU everything talks through gloo.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=20)  # of a collective: long enough to load a model, short enough not to lose a night

LAUNCHERS = {"TORCHELASTIC_RUN_ID", "CROSS_RANK"}  # what torchrun and deepspeed leave in the environment


@dataclass(frozen=True)
class Processes:
    rank: int
    ranks: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.ranks > 1:
            dist.barrier()


def start_processes(deepspeed: dict[str, Any] | None) -> Processes:
    """Join the other processes, if there are any. DeepSpeed wants a process group even for one."""
    if not LAUNCHERS.isdisjoint(os.environ):
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if gpu else "gloo"
    if deepspeed is not None:
        if not gpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0"), ("LOCAL_RANK", "0")):
            os.environ.setdefault(name, value)
        os.environ.setdefault("RANK", str(rank))
        os.environ.setdefault("WORLD_SIZE", str(ranks))
        import deepspeed as ds

        if not gpu:
            # DeepSpeed would compile its shared-memory collectives now, behind a lock file that a killed run leaves
            # behind, and for which every later run would wait without end. gloo does without.
            ds.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=TIMEOUT)
        ds.init_distributed(dist_backend=backend, timeout=TIMEOUT)
    elif ranks > 1 and not dist.is_initialized():
        dist.init_process_group(backend, timeout=TIMEOUT)
    return Processes(rank, ranks, device)


def _end_with(launcher: int) -> None:
    """A launcher that is killed cannot stop its processes: they would go on, beside the run that follows."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def quiet_libraries() -> None:
    """No bars and notices but our own: with thirty-two processes nobody finds an error among them."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for module in ("peft", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def read_deepspeed(path: str | None, hidden_size: int | None = None) -> dict[str, Any] | None:
    """The DeepSpeed configuration at `path`, with what transformers would look up in a model it does not know."""
    if path is None:
        return None
    try:
        tree: dict[str, Any] = json.loads(Path(path).read_text())
    except OSError as error:
        raise OSError(f"deepspeed = {path!r} cannot be read ({error.strerror}); configs/deepspeed has some") from None
    except ValueError as error:
        raise ValueError(f"deepspeed = {path!r} is not JSON: {error}") from None
    for kind in ("bf16", "fp16"):
        if tree.get(kind, {}).get("enabled") is True:
            raise ValueError(
                f"deepspeed = {path!r} enables {kind}, which would round heads and adapters too; remove it there: "
                "model.dtype says what the model computes in"
            )
    zero = tree.setdefault("zero_optimization", {"stage": 0})
    if hidden_size is not None:
        automatic = {
            "reduce_bucket_size": hidden_size * hidden_size,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
        zero.update({key: value for key, value in automatic.items() if zero.get(key) == "auto"})
    if not torch.cuda.is_available():
        zero["overlap_comm"] = False  # there are no streams to overlap on
        for part in ("offload_optimizer", "offload_param"):
            if part in zero:
                zero[part]["pin_memory"] = False
    return tree


def zero_stage(deepspeed: dict[str, Any] | None) -> int:
    return 0 if deepspeed is None else int(deepspeed["zero_optimization"].get("stage", 0))

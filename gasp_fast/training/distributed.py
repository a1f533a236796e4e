"""Rank, process group, DeepSpeed configuration and accelerate's `Accelerator`.

The same command line runs alone, under torchrun and under the deepspeed launcher. Launchers pass rank and world size in
environment variables. Without a GPU, processes communicate through gloo.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from torch import Tensor

from gasp_fast.config.recipes import sharding_file
from gasp_fast.files import read_json
from gasp_fast.processes import end_with_parent

from .stream import Share

Result = TypeVar("Result")

LAUNCHERS = {"TORCHELASTIC_RUN_ID", "CROSS_RANK"}  # variables that torchrun and deepspeed set


@dataclass(frozen=True)
class Processes:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def file_group(self, timeout: float) -> dist.ProcessGroup | None:
        """A group for checkpoints, which a thread may use beside training; None without processes. All must call."""
        if not dist.is_initialized():
            return None
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def largest(self, value: float) -> Tensor:
        """The largest `value` of all processes, on the device. The host does not wait for a GPU. All must call."""
        tensor = torch.full((), float(value), device=self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def total(self, tensor: Tensor) -> Tensor:
        """`tensor`, on the device, summed over all processes in place. The host does not wait. All must call."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_all(self, value: Result) -> list[Result]:
        """The `value` of every process. All must call."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def decided_by_first(self, decide: Callable[[], Result]) -> Result:
        """What `decide` returns on the first process, on all of them. A ValueError or OSError is raised on all."""
        if self.world_size == 1:
            return decide()
        outcome: list[Any] = [None, None]  # result, error
        if self.first:
            try:
                outcome[0] = decide()
            except (ValueError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        result: Result = outcome[0]
        return result


def launched() -> bool:
    """Whether torchrun or deepspeed started this process."""
    return not LAUNCHERS.isdisjoint(os.environ)


def start_processes(deepspeed: bool = False, timeout: float = 600.0) -> Processes:
    """Join the other processes of the run, if there are any. DeepSpeed needs a process group even for one process.

    A collective that takes longer than `timeout` seconds, because a process is frozen, is an error.
    """
    if launched():
        end_with_parent(os.getppid())
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which accelerate imports, would warn otherwise
    backend = "nccl" if gpu else "gloo"
    if deepspeed:
        alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
        for name, value in alone.items():
            os.environ.setdefault(name, value)
    if (deepspeed or world_size > 1) and not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    if deepspeed:
        _start_deepspeed(backend, timedelta(seconds=timeout))
    return Processes(rank, world_size, device)


def _start_deepspeed(backend: str, timeout: timedelta) -> None:
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Gloo(CPU_Accelerator):
        """DeepSpeed's CPU, without its shared-memory collectives.

        DeepSpeed would compile those behind a lock file. A killed run leaves the file behind, and every later run would
        wait for it for ever. gloo does the same work without.
        """

        def create_op_builder(self, op_name: str) -> Any:
            return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)

    deepspeed.utils.logger.setLevel("WARNING")
    if backend == "gloo":
        set_accelerator(Gloo())
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout)


def lost_process(error: RuntimeError) -> bool:
    """Whether a collective failed, because another process has ended or is frozen. gloo's errors have no type."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def stop_processes() -> None:
    """Leave the process group. Call it when nothing refers to the model: its wrappers hold the group.

    A group that is still held runs its threads while the interpreter is torn down, which can abort the process.
    """
    gc.collect()  # training loop and wrappers refer to each other
    if dist.is_initialized():
        dist.destroy_process_group()


def quiet_libraries() -> None:
    """Switch off the libraries' progress bars and notices: between those of 32 processes an error would be lost."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for module in ("transformers", "peft", "accelerate", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # of checkpoints of a single process


# ---- DeepSpeed ------------------------------------------------------------------------------------------------------


def read_deepspeed(path: str | None) -> dict[str, Any] | None:
    """The DeepSpeed configuration at `path`, checked, and adapted to a machine without GPUs."""
    if path is None:
        return None
    try:
        tree = read_json(sharding_file(path))
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"deepspeed = {path!r} cannot be read ({reason}); gasp-fast recipes lists some") from None
    except ValueError as error:
        raise ValueError(f"deepspeed = {error}; begin with zero1, zero2 or zero3") from None
    sections = ("bf16", "fp16", "zero_optimization")
    if not isinstance(tree, dict) or not all(isinstance(tree.get(name, {}), dict) for name in sections):
        raise ValueError(
            f"deepspeed = {path!r} must be a JSON object, and {', '.join(sections)} in it too; begin with zero1, "
            "zero2 or zero3"
        )
    for kind in ("bf16", "fp16"):
        if tree.get(kind, {}).get("enabled") is True:
            raise ValueError(
                f"deepspeed = {path!r} enables {kind}, which would round heads and adapters too; remove it there: "
                "model.dtype says what the model computes in"
            )
    zero = tree.get("zero_optimization", {})
    for part in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(part, {}), dict):
            raise ValueError(f"deepspeed = {path!r} has {part} = {zero[part]!r}; it must be a JSON object")
    if not zero.get("stage"):  # without ZeRO, DeepSpeed would step with a gradient that is not finite
        raise ValueError(f"deepspeed = {path!r} has no zero_optimization.stage of 1, 2 or 3; use deepspeed=null")
    if type(zero["stage"]) is not int or zero["stage"] not in (1, 2, 3):
        raise ValueError(f"deepspeed = {path!r} has zero_optimization.stage = {zero['stage']!r}; write 1, 2 or 3")
    offload = zero.get("offload_optimizer")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        raise ValueError(
            f"deepspeed = {path!r} moves the optimiser to NVMe, from where checkpoints are not written; use the device "
            "cpu"
        )
    if not torch.cuda.is_available():
        zero["overlap_comm"] = False  # a CPU has no streams to overlap
        for part in ("offload_optimizer", "offload_param"):
            if isinstance(zero.get(part), dict):
                zero[part]["pin_memory"] = False
    return tree


def fill_deepspeed(deepspeed: dict[str, Any], share: Share, clip: float, hidden_size: int) -> dict[str, Any]:
    """`deepspeed` with the run's values in place of every "auto". Raises where the file contradicts the recipe."""
    accumulation = share.accumulation
    offload = deepspeed["zero_optimization"].get("offload_optimizer") or {}
    if accumulation is None and offload.get("device", "none") != "none":
        raise ValueError(
            f"train.tokens_at_once = {share.tokens_at_once}: DeepSpeed's offload_optimizer needs the same number of "
            "micro-batches in each step; give train.micro_batch_size instead"
        )
    from_recipe = {
        # Where their number differs from step to step, DeepSpeed is given one: it only divides the loss by it.
        "train_batch_size": share.world_size if accumulation is None else share.batch_size,
        "train_micro_batch_size_per_gpu": share.micro_batch_size or 1,
        "gradient_accumulation_steps": accumulation or 1,
        "gradient_clipping": clip,
    }
    for name, value in from_recipe.items():
        if deepspeed.get(name, "auto") not in ("auto", value):
            raise ValueError(
                f'the deepspeed file has {name} = {deepspeed[name]}, the recipe makes it {value}; write "auto" there'
            )
    bucket_sizes = {  # in elements; the same rules as in transformers
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero = deepspeed["zero_optimization"]
    return {
        **deepspeed,
        **{name: value for name, value in from_recipe.items() if deepspeed.get(name) == "auto"},
        "zero_optimization": {**zero, **{name: v for name, v in bucket_sizes.items() if zero.get(name) == "auto"}},
    }


# ---- accelerate -----------------------------------------------------------------------------------------------------


def make_accelerator(
    config: Any, processes: Processes, share: Share, deepspeed: dict[str, Any] | None, may_skip_weights: bool
) -> Accelerator:
    """The `Accelerator` of the run. `deepspeed` has no "auto" left (`fill_deepspeed`).

    accelerate keeps its state until the process ends, so only the first run of a process can use DeepSpeed.
    """
    try:
        PartialState(cpu=processes.device.type == "cpu")
        accelerator = Accelerator(
            mixed_precision="no",  # the model chooses its precision itself
            gradient_accumulation_steps=share.accumulation or 1,
            deepspeed_plugin=None if deepspeed is None else DeepSpeedPlugin(hf_ds_config=deepspeed),
            log_with=list(config.run.report_to) or None,
            project_dir=config.run.out,
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    find_unused_parameters=may_skip_weights,
                    broadcast_buffers=False,
                )
            ],
        )
    except NotImplementedError:
        accelerator = None
    if accelerator is None or (accelerator.distributed_type == DistributedType.DEEPSPEED) != (deepspeed is not None):
        raise ValueError(
            f"deepspeed = {config.deepspeed!r}: this Python process has trained with another launcher or another "
            "DeepSpeed file before; start a new process for each"
        )
    return accelerator

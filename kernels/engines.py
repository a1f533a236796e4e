"""Backends: which ones exist, and how one is chosen.

| backend  | device           | computes                                                                           |
| -------- | ---------------- | ---------------------------------------------------------------------------------- |
| `triton` | CUDA             | `chunked`, with the row operations of `rows_triton`; without gradient,             |
|          |                  | `product_statistics` where blocks would cut columns                                |
| `cpp`    | CPU              | `chunked`, with the row operations of `rows_cpp`                                   |
| `torch`  | any              | dense, by autograd (`gasp_fast.loss.dense`); no engine                             |

Under `TRITON_INTERPRET=1` the triton backend also accepts CPU tensors. That is slow; it serves to test the kernels
without a GPU. Only the dense backend computes in float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import rows_cpp, rows_torch
from .chunk import RowOperations
from .chunked import ChunkedEngine, Forward

CPU_WORKSPACE, GPU_WORKSPACE, LARGE_GPU_WORKSPACE = 24, 128, 256  # MiB, where the caller gives none
LARGE_GPU = 40 << 30  # bytes of memory
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "triton", "cpp", "torch")


def triton_available() -> bool:
    from . import rows_triton

    return rows_triton.available()


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that `auto` stands for, or the given one if it supports this device and type."""
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if dtype not in FAST_DTYPES:
            return "torch"
        if device.type == "cuda" and triton_available():
            return "triton"
        return "cpp" if device.type == "cpu" and rows_cpp.available() else "torch"
    if backend == "torch":
        return backend
    if dtype not in FAST_DTYPES:
        raise ValueError(f"backend = {backend!r} does not take {dtype}; use backend='torch'")
    if backend == "cpp":
        if device.type != "cpu":
            raise ValueError(f"backend = 'cpp' works on CPU tensors, embeddings lie on {device}; use backend='triton'")
        if not rows_cpp.available():
            raise RuntimeError(f"backend = 'cpp' is not built ({rows_cpp.WHY_MISSING}); reinstall gasp_fast")
    if backend == "triton":
        if device.type != "cuda" and not interpreted():
            raise ValueError(f"backend = 'triton' works on CUDA tensors, embeddings lie on {device}; use backend='cpp'")
        if not triton_available():
            raise RuntimeError("backend = 'triton' needs Triton; pip install triton, or use backend='torch'")
    return backend


def workspace_bytes(workspace: int | None, device: torch.device) -> int:
    """Bytes of scratch memory: `workspace` in MiB, or the default of the device."""
    if workspace is not None:
        return workspace << 20
    if device.type != "cuda":
        return CPU_WORKSPACE << 20
    large = torch.cuda.get_device_properties(device).total_memory >= LARGE_GPU
    return (LARGE_GPU_WORKSPACE if large else GPU_WORKSPACE) << 20


def inverse_norms(embeddings: Tensor, duals: Tensor | None = None) -> Tensor:
    """`1 / max(|e|, 1e-12)`, float32 [L, N], of embeddings [L, N, D]: in one kernel on a GPU, else by torch."""
    if choose_backend("auto", embeddings.device, embeddings.dtype) != "triton":
        return rows_torch.inverse_norms(embeddings, duals)
    from . import rows_triton

    return rows_triton.inverse_norms(embeddings, duals)


@cache
def survive_fork() -> None:
    """From the first use on the CPU on, the children of a fork compute on one thread, as loader workers do.

    A fork copies OpenMP's list of threads but not the threads: a child that shared work would wait for them for ever.
    """
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def cpp_engine(embeddings: Tensor, workspace: int | None = None) -> ChunkedEngine:
    survive_fork()
    bytes_ = workspace_bytes(workspace, embeddings.device)
    return ChunkedEngine(operations=rows_cpp, workspace_bytes=bytes_ * 5 // 6)  # the rest is for converted tokens


def triton_engine(embeddings: Tensor, workspace: int | None = None) -> ChunkedEngine:
    from . import product_statistics, rows_triton

    bytes_ = workspace_bytes(workspace, embeddings.device) * 31 // 32  # the rest is for the statistics of a part
    return ChunkedEngine(operations=rows_triton, workspace_bytes=bytes_, forward=product_statistics, replays=True)


# Backend -> its engine for some embeddings [L, N, D] and a workspace in MiB. Another engine can be registered here.
ENGINES: dict[str, Callable[[Tensor, int | None], ChunkedEngine]] = {"cpp": cpp_engine, "triton": triton_engine}

if TYPE_CHECKING:  # mypy checks here that each module has all operations
    from . import product_statistics, rows_triton

    _operations: tuple[RowOperations, ...] = (rows_cpp, rows_torch, rows_triton)
    _forward: Forward = product_statistics

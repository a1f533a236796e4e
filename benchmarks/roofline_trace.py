"""Records what one call of the loss would run on a GPU, without a GPU: products, Triton launches, torch operations.

`gasp_loss` runs as it is, forward and backward, on meta tensors: they have a shape and a type, but no memory. Each
operation of torch and each launch of a Triton kernel is recorded with the bytes that it touches. So block sizes,
launches and buffers are those of the real engine, for problems of any size.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import math
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gasp_fast
from gasp_fast import kernels
from gasp_fast.benchmarking.workloads import Workload
from gasp_fast.kernels import engines, scaling, triton_launch
from gasp_fast.kernels.chunked import ChunkedEngine
from gasp_fast.kernels.products import Products
from gasp_fast.loss import operators
from gasp_fast.loss.autograd import FusedLoss

# A module that is imported during a trace would keep the launch of that trace: later ones would miss its kernels.
for _module in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
    importlib.import_module(_module.name)

MULTIPROCESSORS = 132  # of an H100 and of an H200
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
TAKES_SOME_ROWS = {"index_select", "index", "gather"}  # read as much as they write
WRITES_SOME_ROWS = {"index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_"}
ALLOCATES = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
# Triton kernels
TOUCHES_SOME_ROWS = {"add_rows", "gather_rows", "gather_columns"}
WRITES_SINGLE_NUMBERS = {("frame_statistics", "similarity")}
READS_EVERY_SECTOR = {("gather_columns", "x")}  # also of what it does not copy
IN_PLACE = {"scale", "add_rows", "add_transposed"}
MATRIX = 3  # tensors with fewer dimensions are vectors and tables: a few percent of the bytes, left out


@dataclass(frozen=True)
class Region:
    """Bytes of a tensor's memory."""

    storage: int
    start: int
    size: int

    @staticmethod
    def of(tensor: Tensor, size: int | None = None) -> Region:
        first = tensor.storage_offset() * tensor.element_size()
        largest = tensor.untyped_storage().nbytes() - first
        every = tensor.numel() * tensor.element_size()
        return Region(tensor.untyped_storage()._cdata, first, min(largest, every if size is None else size))


@dataclass(frozen=True)
class Work:
    """One kernel on the device. `reads` and `writes` are what it moves, not the size of its arguments."""

    name: str
    reads: list[Region] = field(default_factory=list)
    writes: list[Region] = field(default_factory=list)


@dataclass(frozen=True)
class Product(Work):
    """`batch` products [m, k] x [k, n] with results of `out_bytes` each, added to what is there if `accumulate`."""

    batch: int = 1
    m: int = 1
    n: int = 1
    k: int = 1
    out_bytes: int = 2
    accumulate: bool = False


@dataclass(frozen=True)
class Launch(Work):
    """A Triton kernel, and what `roofline_sass` needs to compile it."""

    grid: tuple[int, ...] = (1,)
    tile: Any = None
    kernel: Any = None
    arguments: tuple[Any, ...] = ()
    constants: dict[str, Any] = field(default_factory=dict)
    numbers: int = 1  # of the largest matrix

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def named_arguments(self) -> dict[str, Any]:
        return dict(zip(self.kernel.function.arg_names, self.arguments, strict=False))

    @staticmethod
    def host_values(tensor: Tensor) -> Tensor:
        """The numbers of a table that the host computed and copied to the device."""
        return tensor.host_values  # type: ignore[attr-defined]


@dataclass
class Trace:
    """All work of one call, in order; operations that only the host sees are counted."""

    work: list[Work] = field(default_factory=list)
    views: int = 0
    allocations: int = 0

    def clear(self) -> None:
        self.work.clear()
        self.views = self.allocations = 0

    def of(self, kind: type[Work]) -> list[Any]:
        return [work for work in self.work if type(work) is kind]


class _Recorder(TorchDispatchMode):
    """Appends every operation of torch to a trace. Results written into `out` are not computed."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, returns = function._schema.name.split("::")[1], function._schema.returns
        out = kwargs.get("out")
        result = out if out is not None and name in PRODUCTS else function(*args, **kwargs)
        given = [value for value in _flat((args, kwargs)) if isinstance(value, Tensor)]
        if not any(value.is_meta for value in [*given, *_flat(result)] if isinstance(value, Tensor)):
            return result
        if name == "_to_copy" and not given[0].is_meta:
            result.host_values = given[0]
        if name in ALLOCATES:
            self.trace.allocations += 1
        elif returns and returns[0].alias_info is not None and not returns[0].alias_info.is_write:
            self.trace.views += 1
        elif isinstance(result, Tensor):
            self.trace.work.append(_operation(name, given, result))
        return result


def _operation(name: str, given: list[Tensor], result: Tensor) -> Work:
    if name in PRODUCTS:
        a, b = [value for value in given if value is not result][-2:]
        batch = a.shape[0] if a.dim() == 3 else 1
        return Product(
            name, [Region.of(a), Region.of(b)], [Region.of(result)], batch, a.shape[-2], b.shape[-1], a.shape[-1],
            result.element_size(), accumulate=name in ("addmm", "baddbmm"),
        )  # fmt: skip
    matrices = [value for value in given if value.dim() >= MATRIX]
    if name in TAKES_SOME_ROWS:
        return Work(name, [Region.of(value, result.nbytes) for value in matrices[:1]], [Region.of(result)])
    if name in WRITES_SOME_ROWS:
        rows = min(matrices, key=lambda value: value.numel(), default=result)
        target = Region.of(result, rows.numel() * result.element_size())
        return Work(name, [Region.of(rows), *([target] if "add" in name else [])], [target])
    inputs = matrices if name not in ("copy_", "zero_", "fill_") else [m for m in matrices if m is not result]
    return Work(name, [Region.of(value) for value in inputs], [Region.of(result)] if result.dim() >= MATRIX else [])


def _recording_launch(trace: Trace) -> Any:
    def launch(kernel: Any, grid: tuple[int, ...], tile: Any, *arguments: Any, **constants: Any) -> None:
        if 0 not in grid:
            trace.work.append(_launched(kernel, grid, tile, arguments, constants))

    return launch


def _launched(
    kernel: Any, grid: tuple[int, ...], tile: Any, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> Launch:
    function = kernel.function
    named = dict(zip(function.arg_names, arguments, strict=False))
    matrices = {name: value for name, value in named.items() if isinstance(value, Tensor) and value.dim() >= MATRIX}
    added = matrices.pop("added", None)
    # Of a larger matrix as many as the smaller one has.
    some = function.__name__ in TOUCHES_SOME_ROWS or named.get("place") is not None
    least = min((value.numel() for value in matrices.values()), default=1)
    reads, writes = [], []
    for name, value in matrices.items():
        whole = not some or (function.__name__, name) in READS_EVERY_SECTOR
        region = Region.of(value, None if whole else least * value.element_size())
        written = name in kernel.writes and (function.__name__, name) not in WRITES_SINGLE_NUMBERS
        if written:
            writes.append(region)
        if not written or function.__name__ in IN_PLACE:
            reads.append(region)
    if added is not None:
        reads.append(_added_rows(added, named["of_token"]))
    numbers = least if some else max((value.numel() for value in matrices.values()), default=1)
    return Launch(function.__name__, reads, writes, grid, tile, kernel, arguments, dict(constants), numbers)


def _added_rows(added: Tensor, of_token: Tensor) -> Region:
    """The rows that `project_gradient` adds to some tokens of the only sequence, in which anchors are spread evenly."""
    tokens = of_token.untyped_storage().nbytes() // of_token.element_size()
    whole = Region.of(added)
    first, size = (whole.size * count // tokens for count in (of_token.storage_offset(), of_token.numel()))
    return Region(whole.storage, whole.start + first, size)


def trace_loss(workload: Workload, workspace: int, backward: bool, fused: bool = True) -> Trace:
    """What `gasp_loss` runs on one workload, with a workspace in MiB.

    `backward`: with the gradient. `fused`: forward passes use `product_statistics`; if not, they are chunked. The
    call that is recorded is the second with these matches: what depends on them alone is computed already.
    """
    trace = Trace()
    with _patched(trace, fused):
        on_gpu = _without_memory(_matches(workload))
        shape = workload.layers, workload.tokens, workload.width
        embeddings = torch.empty(shape, dtype=workload.dtype, device="meta")
        for _ in range(2):
            trace.clear()
            context = _Context(backward)
            run = mock.patch.object(FusedLoss, "apply", lambda *inputs: FusedLoss.forward(context, *inputs))  # noqa: B023
            with run, _Recorder(trace), torch.no_grad():
                loss = gasp_fast.gasp_loss(embeddings, on_gpu, backend="triton", workspace=workspace).loss
                if backward:
                    FusedLoss.backward(context, torch.ones_like(loss))
    return trace


@functools.cache
def _matches(workload: Workload) -> gasp_fast.Matches:
    return replace(workload, layers=1, width=1).build(torch.device("cpu")).matches


class _Context:
    """What autograd passes to `FusedLoss`. Autograd itself would not run its functions without memory."""

    def __init__(self, backward: bool) -> None:
        self.needs_input_grad = [False] * 6 + [backward]  # of `FusedLoss.forward`: only the embeddings'
        self.saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass


def _without_memory(matches: gasp_fast.Matches) -> gasp_fast.Matches:
    """A copy whose tensors have no memory, except those of the index that the host reads."""
    moved = copy.copy(matches)
    for name, value in vars(matches).items():
        if isinstance(value, Tensor):
            object.__setattr__(moved, name, torch.empty_like(value, device="meta"))
    object.__setattr__(moved, "index", matches.index.map_tensors(lambda value: torch.empty_like(value, device="meta")))
    return moved


@contextlib.contextmanager
def _patched(trace: Trace, fused: bool) -> Iterator[None]:
    """Launches are recorded, operators run their real bodies, and tensors count as those of a GPU."""
    original, record, engine = triton_launch.launch, _recording_launch(trace), engines.triton_engine
    with contextlib.ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        for module in [m for name, m in sys.modules.items() if name.startswith(kernels.__name__)]:
            if getattr(module, "launch", None) is original:
                patch(module, "launch", record)
        for name in ("fused_loss", "unreduced_terms"):
            patch(operators, name, getattr(operators, name)._init_fn)
        patch(operators, "_without_autocast", lambda embeddings: contextlib.nullcontext())
        patch(engines, "interpreted", lambda: True)  # the Triton backend takes tensors of any device
        patch(scaling, "INTERPRETED", True)
        # No layer repeats a recording: each launch is traced, and the host's time is an upper bound.
        changes: dict[str, Any] = {"replays": False} if fused else {"replays": False, "forward": None}
        if fused:
            patch(ChunkedEngine, "streams", lambda *_: True)
        patch(engines, "triton_engine", lambda *args: replace(engine(*args), **changes))
        stack.enter_context(mock.patch.dict(engines.ENGINES, triton=engines.triton_engine))
        patch(Products, "of", staticmethod(_products_of_a_gpu))
        patch(Products, "similarity", lambda self, anchors, tokens, out: self.product(anchors, tokens.mT, out, False))
        yield


def _products_of_a_gpu(embeddings: Tensor) -> Products:
    wide = embeddings.dtype != torch.float32
    return Products(embeddings.dtype, converts=False, wide_result=wide, multiprocessors=MULTIPROCESSORS)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in _flat(part)]
    return [value]

"""Repeats for later layers what the first layers of a call started.

All groups of as many layers start the same kernels and the same products. Between two groups only addresses differ:
those of embeddings, norms, weights, terms and gradients move on by a fixed distance a layer, and all other memory is
the same. To work out views, sizes and arguments again costs the host several times as much as the start of a kernel.
So the first group is recorded while it runs, and the others repeat the recording with moved addresses.

`launch` and the products of `Products` are recorded, if a recording is in progress on their thread. A group that
computes anything in another way cannot be repeated; `ChunkedEngine` knows which these are.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class _Thread(threading.local):
    recording: Recording | None = None


_thread = _Thread()


def current() -> Recording | None:
    """The recording in progress on this thread."""
    return _thread.recording


@dataclass(slots=True)
class Start:
    """The start of a compiled kernel; of its values, those of tensors are addresses."""

    function: Callable[[list[Any]], None]
    values: list[Any]
    moved: list[tuple[int, int, int]]  # position among the values, address for the first group, bytes a layer
    kept: list[Tensor]  # so that their memory is not given to others

    def repeat(self, later: int) -> None:
        for at, address, distance in self.moved:
            self.values[at] = address + later * distance
        self.function(self.values)


@dataclass(slots=True)
class Call:
    """A call of a function, some of whose arguments are tensors."""

    function: Callable[..., None]
    arguments: list[Any]
    moved: list[tuple[int, Tensor, int]]  # position among the arguments, tensor for the first group, bytes a layer

    def repeat(self, later: int) -> None:
        for at, tensor, distance in self.moved:
            offset = tensor.storage_offset() + later * distance // tensor.element_size()
            self.arguments[at] = tensor.as_strided(tensor.shape, tensor.stride(), offset)
        self.function(*self.arguments)


class Recording:
    """What one group of layers starts, in its order. A context manager: records while it is open.

    `layered` are the tensors `[L, ...]` that have a part of their own for every layer. The group begins at layer 0.
    """

    def __init__(self, layered: Sequence[Tensor]) -> None:
        self.device = layered[0].device
        self.steps: list[Start | Call] = []
        # Where each begins and ends in memory, and the bytes from one layer to the next.
        self.spans = [(t.data_ptr(), t.data_ptr() + _extent(t), t.stride(0) * t.element_size()) for t in layered]

    def __enter__(self) -> Recording:
        assert _thread.recording is None
        _thread.recording = self
        return self

    def __exit__(self, *error: object) -> None:
        _thread.recording = None

    def bytes_a_layer(self, tensor: Tensor) -> int:
        """How far a tensor is from that of the next layer; 0: it is the same for all layers."""
        address = tensor.data_ptr()
        distances = {distance for begin, end, distance in self.spans if begin <= address < end}
        if len(distances) > 1:
            raise ValueError("embeddings or keys: layers of two tensors lie in each other's memory; copy one of them")
        return distances.pop() if distances else 0

    def add_start(self, function: Callable[[list[Any]], None], values: list[Any], tensors: dict[int, Tensor]) -> None:
        """`function(values)`, where values are the addresses of `tensors`, by their position."""
        distances = ((at, values[at], self.bytes_a_layer(tensor)) for at, tensor in tensors.items())
        self.steps.append(Start(function, values, [moved for moved in distances if moved[2]], list(tensors.values())))

    def add_call(self, function: Callable[..., None], *arguments: Any) -> None:
        """`function(*arguments)`."""
        tensors = ((at, value) for at, value in enumerate(arguments) if isinstance(value, Tensor))
        distances = ((at, tensor, self.bytes_a_layer(tensor)) for at, tensor in tensors)
        self.steps.append(Call(function, list(arguments), [moved for moved in distances if moved[2]]))

    def repeat(self, first: int) -> None:
        """The same for as many layers from `first` on."""
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self.repeat(first)
        for step in self.steps:
            step.repeat(first)


def recorded(method: Callable[..., None]) -> Callable[..., None]:
    """Decorates a method whose operands are tensors, so that recordings contain its calls."""

    @functools.wraps(method)
    def call(self: Any, *operands: Any) -> None:
        recording = _thread.recording
        if recording is not None:
            recording.add_call(method, self, *operands)
        method(self, *operands)

    return call


def _extent(tensor: Tensor) -> int:
    """Bytes from the first number of a tensor to the end of its last one."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0

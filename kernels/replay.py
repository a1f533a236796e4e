"""Repeats what one group of layers started: for later layers, and for later calls with the same matches.

All groups of as many layers of a sequence start the same kernels and the same products, in one call and in all calls
with the same matches, sizes and types. Only addresses differ. To work out views, sizes and arguments again costs the
host several times as much as the start of a kernel. So one group is recorded while it runs, and others repeat the
recording with other addresses.

A recording describes where each tensor lies, which is one of three places:

- in a tensor of the call: embeddings, weights, terms, gradients. Where these have a part for each layer, the
  place moves on by a fixed distance a layer.
- in scratch memory of the group. A later call allocates it anew, one piece for each element type.
- in a tensor that depends on the matches alone. It stays there.

A tensor in none of these was computed for this call. Later layers of the call use it, too, and other calls do not use
the recording.

`launch` and the products of `Products` are recorded, if a recording is in progress on their thread. A group that
computes anything in another way cannot be repeated; `ChunkedEngine` knows which these are.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .index import MatchIndex

ALIGNED = 512  # bytes: CUDA's allocator returns multiples of it, too


class _Thread(threading.local):
    recording: Recording | None = None


_thread = _Thread()


def current() -> Recording | None:
    """The recording in progress on this thread."""
    return _thread.recording


def scratch(memory: Tensor) -> Tensor:
    """Adds memory that was just allocated to the recording in progress, as scratch memory of the group."""
    if _thread.recording is not None:
        _thread.recording.add_scratch(memory)
    return memory


class Span(NamedTuple):
    """The memory of a tensor."""

    begin: int
    end: int
    base: int  # number of the tensor of the call, or of the piece of scratch memory
    layer: int  # bytes from one layer to the next; 0: it is the same for all
    offset: int  # bytes from the beginning of that piece

    @staticmethod
    def of(tensor: Tensor, base: int, layer: int = 0, offset: int = 0) -> Span:
        return Span(tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), base, layer, offset)


@dataclass(slots=True)
class Start:
    """The start of a compiled kernel; of its values, those of tensors are addresses."""

    function: Callable[[list[Any]], None]
    values: list[Any]
    fixed: list[tuple[int, int, int]] = field(default_factory=list)  # position among the values, base, offset
    moved: list[tuple[int, int, int, int]] = field(default_factory=list)  # the same, and the bytes from layer to layer

    def place(self, recording: Recording) -> None:
        for at, base, offset in self.fixed:
            self.values[at] = recording.addresses[base] + offset

    def repeat(self, recording: Recording, later: int) -> None:
        for at, base, offset, layer in self.moved:
            self.values[at] = recording.addresses[base] + offset + later * layer
        self.function(self.values)

    def release(self) -> None:
        """Addresses hold no memory."""


@dataclass(slots=True)
class View:
    """A tensor as a part of another of the same element type; distances in numbers."""

    at: int  # position among the arguments of a call
    base: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    layer: int

    def of(self, bases: Sequence[Tensor], later: int) -> Tensor:
        base = bases[self.base]
        return base.as_strided(self.shape, self.stride, base.storage_offset() + self.offset + later * self.layer)


@dataclass(slots=True)
class Call:
    """A call of a function, some of whose arguments are tensors."""

    function: Callable[..., None]
    arguments: list[Any]
    fixed: list[View] = field(default_factory=list)
    moved: list[View] = field(default_factory=list)

    def place(self, recording: Recording) -> None:
        for view in self.fixed:
            self.arguments[view.at] = view.of(recording.bases, 0)

    def repeat(self, recording: Recording, later: int) -> None:
        for view in self.moved:
            self.arguments[view.at] = view.of(recording.bases, later)
        self.function(*self.arguments)

    def release(self) -> None:
        for view in (*self.fixed, *self.moved):
            self.arguments[view.at] = None


@dataclass(frozen=True)
class CallTensors:
    """The tensors of a call, and what its recordings may be used for."""

    matches: MatchIndex  # recordings last as long as it; later calls find its tensors where they are
    form: Hashable  # calls with the same matches and form start the same
    layered: list[Tensor]  # [L, ...] with a part for each layer
    others: list[Tensor]


class Recording:
    """What one group of layers starts, in its order. A context manager: records while it is open.

    The group begins at layer 0 of the call.
    """

    def __init__(self, call: CallTensors) -> None:
        self.device = call.layered[0].device
        self.steps: list[Start | Call] = []
        self.bases = [*call.layered, *call.others]
        self.addresses = [base.data_ptr() for base in self.bases]
        self.scratch_base = len(self.bases)
        layers = [base.stride(0) * base.element_size() for base in call.layered] + [0] * len(call.others)
        self.spans = [Span.of(base, at, layer) for at, (base, layer) in enumerate(zip(self.bases, layers, strict=True))]
        self.scratch_sizes: dict[torch.dtype, int] = {}  # how many numbers of each type
        self.references: list[Tensor] = []  # what this call needs until all layers are done
        self.persistent = [Span.of(tensor, 0) for tensor in call.matches.tensors()]
        ordered = sorted(self.spans)
        # Of two tensors that share memory, a place in one may be meant as a place in the other.
        self.reusable = all(a.end <= b.begin for a, b in itertools.pairwise(ordered))

    def __enter__(self) -> Recording:
        assert _thread.recording is None
        _thread.recording = self
        return self

    def __exit__(self, *error: object) -> None:
        _thread.recording = None

    def add_scratch(self, memory: Tensor) -> None:
        size, begin = memory.element_size(), self.scratch_sizes.setdefault(memory.dtype, 0)
        base = self.scratch_base + list(self.scratch_sizes).index(memory.dtype)
        span = Span.of(memory, base, offset=begin * size)
        self.scratch_sizes[memory.dtype] = begin + -(-(span.end - span.begin) // ALIGNED) * ALIGNED // size
        self.spans.append(span)
        self.references.append(memory)

    def span_of(self, tensor: Tensor) -> Span | None:
        """The tensor of the call or the scratch memory that a tensor lies in; None: neither."""
        address = tensor.data_ptr()
        found = [span for span in self.spans if span.begin <= address < span.end]
        if len({span.layer for span in found}) > 1:
            raise ValueError("embeddings or keys: layers of two tensors lie in each other's memory; copy one of them")
        if found:
            return found[0]
        self.references.append(tensor)
        if tensor.numel() > 0 and not any(span.begin <= address < span.end for span in self.persistent):
            self.reusable = False
        return None

    def add_start(self, function: Callable[[list[Any]], None], values: list[Any], tensors: dict[int, Tensor]) -> None:
        """`function(values)`, where values are the addresses of `tensors`, by their position."""
        start = Start(function, values)
        for at, tensor in tensors.items():
            span = self.span_of(tensor)
            if span is None:
                continue
            offset = span.offset + values[at] - span.begin
            if span.layer:
                start.moved.append((at, span.base, offset, span.layer))
            else:
                start.fixed.append((at, span.base, offset))
        self.steps.append(start)

    def add_call(self, function: Callable[..., None], *arguments: Any) -> None:
        """`function(*arguments)`."""
        call = Call(function, list(arguments))
        for at, tensor in enumerate(arguments):
            span = self.span_of(tensor) if isinstance(tensor, Tensor) else None
            if span is None:
                continue
            size = tensor.element_size()
            offset = (span.offset + tensor.data_ptr() - span.begin) // size
            view = View(at, span.base, tensor.shape, tensor.stride(), offset, span.layer // size)
            (call.moved if span.layer else call.fixed).append(view)
        self.steps.append(call)

    def place(self, call: CallTensors) -> None:
        """Moves everything to the tensors of another call and to new scratch memory."""
        like = call.layered[0]
        pieces = [like.new_empty(count, dtype=element) for element, count in self.scratch_sizes.items()]
        self.bases = [*call.layered, *call.others, *pieces]
        self.addresses = [base.data_ptr() for base in self.bases]
        for step in self.steps:
            step.place(self)

    def repeat(self, first: int) -> None:
        """The same for as many layers from `first` on."""
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self.repeat(first)
        for step in self.steps:
            step.repeat(self, first)

    def release(self) -> None:
        """Drops every reference to the memory of the call."""
        self.bases, self.references, self.spans = [], [], []
        for step in self.steps:
            step.release()


_recordings: WeakKeyDictionary[MatchIndex, dict[Hashable, Recording | None]] = WeakKeyDictionary()


def take(call: CallTensors, group: Hashable) -> tuple[bool, Recording | None]:
    """Whether an earlier call asked for the same group of layers, and its recording, placed for this call.

    No other call gets the recording until `store` returns it.
    """
    known = _recordings.get(call.matches, {})
    key = call.form, group
    if key not in known:
        return False, None
    recording = known.pop(key)
    if recording is not None:
        recording.place(call)
    return True, recording


def store(call: CallTensors, group: Hashable, recording: Recording | None) -> None:
    """For later calls: the recording, if it can serve them; otherwise only that there was a call."""
    if recording is not None:
        recording.release()
    reusable = recording is not None and recording.reusable
    _recordings.setdefault(call.matches, {})[call.form, group] = recording if reusable else None


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

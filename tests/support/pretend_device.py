"""A pretended accelerator, to find where the host would wait for a real one.

Tensors that a program sends to the device `cpu:0` count as lying there, and so does whatever is computed from them.
They are computed on the CPU as before, but say that their device is `cpu:0`. What would make the host wait for a GPU is
recorded with its place in the code: reading a number, an output whose shape depends on numbers (`nonzero`, indexing
with a mask), a copy to the host, and a copy to the device that does not return at once.

The operators of this package count as one operation each; what is inside them is not seen.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu", 0)
HOST = torch.device("cpu")
_READS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.__array__: "numpy"}  # the dispatcher sees no reading
_INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}
_DEPENDS_ON_NUMBERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_PASSED_THROUGH = ("/torch/", "contextlib.py", "functools.py")
_DEVICE_FROM_CPP = "torch/nn/utils/clip_grad.py"  # takes devices from C++ code, where the pretended one is the host


class PretendedDevice:
    """As a context manager, records every wait of the host in `waits`: what waited, and the innermost places."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self._storages: dict[int, Any] = {}  # by address; kept alive, so that no address is used twice
        self._modes = (_Operations(self), _Calls(self))

    def __enter__(self) -> PretendedDevice:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def place(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors, and all that share their memory, as lying on the device."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr():
                self._storages[storage.data_ptr()] = storage
            else:  # an empty tensor has no address
                tensor.on_pretended_device = True  # type: ignore[attr-defined]

    def leave(self, tensor: Tensor) -> None:
        """Count a new tensor as lying on the host."""
        self._storages.pop(tensor.untyped_storage().data_ptr(), None)
        tensor.on_pretended_device = False  # type: ignore[attr-defined]

    def holds(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        return value.untyped_storage().data_ptr() in self._storages or getattr(value, "on_pretended_device", False)

    def record(self, what: str) -> None:
        frames = [
            f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.name}"
            for frame in reversed(traceback.extract_stack())
            if not any(part in frame.filename for part in _PASSED_THROUGH) and frame.filename != __file__
        ]
        self.waits.append(f"{what} in {' < '.join(frames[:4])}")


class _Operations(TorchDispatchMode):
    """Follows tensors through all operations."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [self.device.holds(tensor) for tensor in inputs]
        if any(there):
            self._check(func, inputs, there, kwargs or {})
        out = func(*args, **(kwargs or {}))
        if any(there):
            self.device.place(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out

    def _check(self, func: Any, inputs: list[Tensor], there: list[bool], kwargs: dict[str, Any]) -> None:
        name = func.overloadpacket.__name__
        if name in _INDEXING:
            if any(tensor.dtype in (torch.bool, torch.uint8) for tensor in inputs[1:]):
                self.device.record(f"{name} with a mask")
        elif _DEPENDS_ON_NUMBERS & set(func.tags) and kwargs.get("output_size") is None:
            self.device.record(name)
        elsewhere = [tensor for tensor, on_device in zip(inputs, there, strict=True) if not on_device]
        if func.namespace == "aten" and any(tensor.dim() and tensor.numel() for tensor in elsewhere):
            self.device.record(f"{name} with a tensor of the host")


class _Calls(TorchFunctionMode):
    """Sees where tensors are created and copied, and where their device is read."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE if self.device.holds(args[0]) else HOST
        if func in _READS and self.device.holds(args[0]):
            self.device.record(_READS[func])
        out = func(*args, **kwargs)
        if func is Tensor.cpu:
            return self._copied(args[0], HOST, out, kwargs.get("non_blocking", False))
        if func is Tensor.to:
            from_cpp = sys._getframe(1).f_code.co_filename.endswith(_DEVICE_FROM_CPP)
            target = None if from_cpp else _target(args[1:], kwargs)
            return self._copied(args[0], target, out, kwargs.get("non_blocking", False))
        device = kwargs.get("device")
        if device is not None and torch.device(device) == DEVICE and isinstance(out, Tensor):
            if func in (torch.tensor, torch.as_tensor) and not self.device.holds(args[0]):
                self.device.record(f"{func.__name__} with a device")
            self.device.place([out])
        return out

    def _copied(self, source: Tensor, target: torch.device | None, out: Tensor, non_blocking: bool) -> Tensor:
        if target is None or (target == DEVICE) == self.device.holds(source):
            return out
        if not non_blocking:
            self.device.record("copy to the device" if target == DEVICE else "copy to the host")
        out = out.detach().clone()
        if target == DEVICE:
            self.device.place([out])
        else:
            self.device.leave(out)
        return out


def _target(args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call of `Tensor.to` names."""
    for value in (kwargs.get("device"), kwargs.get("other"), *args[:1]):
        if isinstance(value, Tensor):
            return value.device
        if isinstance(value, (str, torch.device)):
            return torch.device(value)
    return None

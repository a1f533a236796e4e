"""Checks of the public functions' arguments. Each error names the argument, the wrong value and the cure.

Types and shapes are checked before any kernel runs. Numbers are read only where they are on the CPU: reading one from a
GPU makes the host wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .config import LEAST_TEMPERATURE, MOST_TEMPERATURE

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def checked_embeddings(embeddings: Tensor | Sequence[Tensor], name: str = "embeddings") -> list[Tensor]:
    """As a list of one tensor [L, N, D] or [N, D], or of L tensors [N, D]: the form that the operators take."""
    if isinstance(embeddings, Tensor):
        _check_plain(name, embeddings)
        if embeddings.dim() not in (2, 3):
            raise ValueError(f"{name} has shape {list(embeddings.shape)}; it must be [L, N, D] or [N, D]")
        _check_size(name, embeddings)
        return [embeddings]
    if not isinstance(embeddings, (list, tuple)) or not embeddings:
        raise TypeError(
            f"{name} is a {type(embeddings).__name__}; pass a tensor [L, N, D] or a non-empty list of [N, D]"
        )
    for at, entry in enumerate(embeddings):
        _check_plain(f"{name}[{at}]", entry)
        if entry.dim() != 2:
            raise ValueError(f"{name}[{at}] has shape {list(entry.shape)}; each entry of a list must be [N, D]")
        for what in ("shape", "dtype", "device"):
            if getattr(entry, what) != getattr(embeddings[0], what):
                raise ValueError(
                    f"{name}[{at}] has {what} {getattr(entry, what)}, {name}[0] has {getattr(embeddings[0], what)}; "
                    "all layers must agree"
                )
    _check_size(f"{name}[0]", embeddings[0])
    return list(embeddings)


def checked_keys(keys: Tensor | Sequence[Tensor] | None, layers: list[Tensor]) -> list[Tensor]:
    """Keys in the form of the embeddings; an empty list where these are the keys."""
    if keys is None:
        return []
    if isinstance(keys, (int, float)) or (isinstance(keys, Tensor) and keys.dim() == 0):
        raise TypeError(f"keys is the number {float(keys)}; pass a temperature by name: temperature={float(keys)}")
    found = checked_embeddings(keys, "keys")
    given, needed = (
        f"{len(tensors)} tensor(s) with shape {list(tensors[0].shape)}, {tensors[0].dtype}, on {tensors[0].device}"
        for tensors in (found, layers)
    )
    if given != needed:
        raise ValueError(f"keys has {given}, embeddings {needed}; pass keys in the form of the embeddings")
    return found


def check_workspace(workspace: int | None) -> None:
    if workspace is None:
        return
    if isinstance(workspace, bool) or not isinstance(workspace, int):
        raise TypeError(f"workspace is a {type(workspace).__name__}; pass a whole number of MiB, or None")
    if workspace < 1:
        raise ValueError(f"workspace = {workspace}; it must be at least 1 (MiB)")


def layer_stack(layers: list[Tensor]) -> Tensor:
    """[L, N, D], for the dense backend."""
    if len(layers) == 1:
        return layers[0] if layers[0].dim() == 3 else layers[0][None]
    return torch.stack(layers)


def layer_count(layers: Sequence[Tensor]) -> int:
    return layers[0].shape[0] if layers[0].dim() == 3 else len(layers)


def checked_layer_weights(layer_weights: Tensor | None, layers: list[Tensor], default: float | None = None) -> Tensor:
    """[L]; without `layer_weights`, the default, or 1 / L each."""
    count, like = layer_count(layers), layers[0]
    if layer_weights is None:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.full((count,), 1.0 / count if default is None else default, dtype=dtype, device=like.device)
    if not isinstance(layer_weights, Tensor) or layer_weights.dtype not in FLOATS:
        raise TypeError("layer_weights must be a floating tensor with one weight per layer")
    if layer_weights.shape != (count,):
        raise ValueError(f"layer_weights has shape {list(layer_weights.shape)}; there are {count} layers")
    if layer_weights.device != like.device:
        raise ValueError(f"layer_weights lies on {layer_weights.device}, embeddings on {like.device}; move it there")
    return layer_weights


def checked_temperature(temperature: float | Tensor, like: Tensor) -> Tensor:
    """A 0-dim tensor; a Python number becomes one on the CPU or, without waiting, on the GPU."""
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0 or temperature.dtype not in FLOATS:
            raise ValueError(
                f"temperature has shape {list(temperature.shape)} and dtype {temperature.dtype}; "
                "pass a number or a 0-dim floating tensor"
            )
        if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
            check_temperature(temperature.item())
        if temperature.device not in (like.device, torch.device("cpu")):
            raise ValueError(f"temperature lies on {temperature.device}, embeddings on {like.device}; move it there")
        return temperature
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature is a {type(temperature).__name__}; pass a number or a 0-dim tensor")
    check_temperature(temperature)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((), temperature, dtype=dtype, device=like.device)


def check_number(name: str, value: float, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; pass a number")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} = {value}; it must be finite and {'positive' if positive else 'not negative'}")


def check_temperature(value: float) -> None:
    if not LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE:
        raise ValueError(
            f"temperature = {value}; it must be positive, from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g} "
            "(the default is 0.07)"
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r}; choose one of {', '.join(map(repr, choices))}")


def check_offsets(name: str, offsets: Tensor, unit: str, end: int, because: str) -> None:
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64 or offsets.dim() != 1:
        raise TypeError(f"{name} must be a one-dimensional int64 tensor")
    check_ascending(name, offsets, unit)
    if int(offsets[-1]) != end:
        raise ValueError(f"{name} ends at {int(offsets[-1])}, but {because}; they must agree")


def check_ascending(name: str, offsets: Tensor, unit: str) -> None:
    if offsets.shape[0] < 2:
        raise ValueError(f"{name} has {offsets.shape[0]} entries; it needs at least 2, the first {unit} and the end")
    if int(offsets[0]) != 0:
        raise ValueError(f"{name}[0] = {int(offsets[0])}; it must be 0, the first {unit}")
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    if len(falls):
        at = int(falls[0]) + 1
        raise ValueError(f"{name}[{at}] = {int(offsets[at])} is less than {name}[{at - 1}]; offsets must ascend")


def check_indices(name: str, index: Tensor, tokens: int) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
        raise TypeError(f"{name} must be a one-dimensional int64 tensor")
    outside = ((index < 0) | (index >= tokens)).nonzero()
    if len(outside):
        at = int(outside[0])
        raise ValueError(f"{name}[{at}] = {int(index[at])} is outside the {tokens} tokens of frame_offsets")


def _check_plain(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; pass a torch tensor")
    if hasattr(tensor, "ds_id"):
        raise TypeError(
            f"{name} is a ZeRO-3 partitioned parameter; gather it first (deepspeed.zero.GatheredParameters), "
            "or pass what a module computed from it"
        )
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor; pass {name}.full_tensor(), or .to_local() where each rank has its own loss"
        )
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be float32, bfloat16, float16 or float64")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; pass {name}.to_dense()")


def traced() -> bool:
    """Whether a compiler or a dispatch mode (fake tensors, operation counters) watches the operations of PyTorch."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _check_size(name: str, tensor: Tensor) -> None:
    if tensor.shape[-1] == 0 or (tensor.dim() == 3 and tensor.shape[0] == 0):
        raise ValueError(f"{name} has shape {list(tensor.shape)}; at least one layer and a width of 1 are needed")
    if tensor.device.type == "meta" and not traced():
        raise ValueError(f"{name} lies on meta, where tensors have no values; move the model to a CPU or GPU first")

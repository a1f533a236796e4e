"""Where the time of a training step goes: every operation and kernel of a profile belongs to one part of the model.

Forward, a part is a range around its modules, the innermost one counts. Backward, nothing of ours runs, but autograd
numbers its nodes: the operation that made a node in forward and the one that runs it backward carry the same number and
the same thread, and what was a head's forward has a head's backward. Recomputation under checkpointing is forward again
and passes the same modules. What belongs to no part, and what cannot be told, is "rest".

    decoder             products of the decoder's frozen weights
    attention           the decoder's attention itself, without its projections
    adapters            the products of A and B
    vision, lm head     all of it
    heads               all of them
    geometric loss      and what it takes to pick and return the rows
    norms, activations  what else runs in decoder layers
    optimiser           AdamW and clipping
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from gasp_fast.backbones import unwrap
from gasp_fast.training.model import SupervisedModel

PARTS = ("decoder", "attention", "adapters", "vision", "lm head", "heads", "geometric loss", "norms, activations",
         "optimiser", "rest")  # fmt: skip
RANGE = "part:"
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul",
            "aten::mkldnn_linear", "mkldnn::_linear_pointwise"}  # fmt: skip
NODE = "autograd::engine::evaluate_function"
Place = tuple[int | None, int]  # thread, and autograd's number there


@contextmanager
def profiled(model: SupervisedModel) -> Iterator[profile]:
    """A profile of what runs inside, with a range around every part of the model."""
    handles = [handle for module, part in _parts(model) for handle in _ranges(module, part)]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    try:
        with profile(activities=activities) as found:
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _parts(model: SupervisedModel) -> Iterator[tuple[nn.Module, str]]:
    inner = unwrap(model.model)
    language: Any = model.backbone.language_model(model.model)
    yield from ((layer, "decoder") for layer in language.layers)
    yield from ((child, "vision") for child in inner.model.children() if child is not language)
    yield inner.get_output_embeddings(), "lm head"
    for name, module in inner.named_modules():
        if ("lora_A." in name or "lora_B." in name) and isinstance(module, nn.Linear):
            yield module, "adapters"
    if model.supervision is not None:
        for layer in model.supervision.by_layer.values():
            yield layer, "geometric loss"
            yield layer.head, "heads"  # type: ignore[misc]


def _ranges(module: nn.Module, part: str) -> Iterator[Any]:
    open_: list[record_function] = []

    def enter(*_: Any) -> None:
        open_.append(record_function(RANGE + part))
        open_[-1].__enter__()

    def leave(*_: Any) -> None:
        open_.pop().__exit__(None, None, None)

    yield module.register_forward_pre_hook(enter)
    # Checkpointing leaves a layer by an exception, as soon as it has recomputed all that is wanted.
    yield module.register_forward_hook(leave, always_call=True)


def seconds_by_part(found: profile) -> tuple[dict[str, float], list[str]]:
    """Seconds of each part (of the GPU, where there is one), and the attention operations that ran in the decoder."""
    events = [event for event in found.events() or [] if event.device_type == DeviceType.CPU]
    made = _nodes(events)
    on_gpu = any(event.self_device_time_total for event in events)
    totals: dict[str, float] = defaultdict(float)
    attention: dict[str, None] = {}
    for event in events:
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if not microseconds:
            continue
        part = _part_of(event, made)
        if part == "decoder" and event.name not in PRODUCTS:
            part = "norms, activations"
        if part == "attention" and _is_attention(event.name):
            attention[event.name] = None
        totals[part] += microseconds / 1e6
    return {part: totals[part] for part in PARTS if totals[part]}, list(attention)


def _is_attention(name: str) -> bool:
    """An operation itself, not the node of its backward."""
    return name.startswith(("aten::scaled_dot_product", "aten::_scaled_dot_product", "flash_attn"))


def _nodes(events: list[Any]) -> dict[Place, Any]:
    """The operation that made each node of the graph: the last to carry its number."""
    made: dict[Place, Any] = {}
    for event in events:
        if event.sequence_nr >= 0 and not _runs_node(event):
            place = (event.thread, event.sequence_nr)
            if place not in made or event.time_range.start >= made[place].time_range.start:
                made[place] = event
    return made


def _runs_node(event: Any) -> bool:
    """Nodes run under their engine's event and one of their own, both with the number of their forward."""
    above = event.cpu_parent
    return event.name.startswith(NODE) or (above is not None and above.name.startswith(NODE))


def _part_of(event: Any, made: dict[Place, Any], followed: int = 0) -> str:
    attention = False
    while event is not None:
        name = event.name
        if name.startswith(RANGE):
            part: str = name.removeprefix(RANGE)
            return "attention" if attention and part == "decoder" else part
        if name.startswith("Optimizer.step"):
            return "optimiser"
        attention |= _is_attention(name)
        if name.startswith(NODE):
            forward = made.get((event.fwd_thread, event.sequence_nr))
            # A backward pass inside a backward pass leads back twice at most: recomputation, then its forward.
            if forward is not None and followed < 4:
                return _part_of(forward, made, followed + 1)
            return "rest"
        event = event.cpu_parent
    return "rest"

"""Seconds of a step by part of the model, from torch's profiler.

In forward, a part is a range around its modules; the innermost range counts. Backward runs no module, but autograd
numbers its nodes: the operation that made a node in forward and the one that runs it backward carry the same number and
the same thread, so a head's backward is attributed through its forward. Recomputation under checkpointing runs the same
modules again. What belongs to no part, or cannot be attributed, is "rest".

    decoder             products of the decoder's frozen weights
    attention           the decoder's attention itself, without its projections
    adapters            the products of A and B
    vision, lm head     the whole module
    heads               all heads; of those whose coordinates are compared, without their second product
    geometric loss      the loss, that second product, and the selection of rows
    norms, activations  what else runs in decoder layers
    optimiser           AdamW and clipping
"""

from __future__ import annotations

from collections import Counter, defaultdict
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
RANGE = "part:"  # prefix of the ranges' names
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul",
            "aten::mkldnn_linear", "mkldnn::_linear_pointwise"}  # fmt: skip
ATTENTION = ("aten::scaled_dot_product", "aten::_scaled_dot_product", "flash_attn")
STOCK = ("torch", "transformers", "peft", "")  # packages of the usual modules
OPTIMISER = ("Optimizer.step", "aten::_foreach_")  # the second: clipping
NODE = "autograd::engine::evaluate_function"
OVERHEAD = {"Command Buffer Full", "Activity Buffer Request"}  # the profiler lists kernels of operations there again
NodeKey = tuple[int | None, int]  # thread, and autograd's number there


@contextmanager
def profiled(model: SupervisedModel) -> Iterator[profile]:
    """A profile of what runs inside, with a range around every part of the model."""
    handles = [handle for module, part in _parts(model) for handle in _add_range(module, part)]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    try:
        with profile(activities=activities) as measured:
            yield measured
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def what_ran(model: SupervisedModel) -> Iterator[dict[str, Any]]:
    """Filled on leaving: tokens, decoder layers that ran again in backward, whether a vision module had a graph.

    `replaced` counts the modules whose forward pass is neither torch's nor transformers' nor peft's, by package.
    """
    language, vision = _language_and_vision(model)
    passes: list[int] = []  # tokens of each forward pass
    runs, graphs = Counter[int](), []

    def begin(module: nn.Module, args: Any, options: dict[str, Any]) -> None:
        passes.append(options["inputs_embeds"].shape[:2].numel())

    def finish(module: nn.Module, args: Any, output: Any) -> None:
        states = getattr(output, "last_hidden_state", output)
        graphs.append(bool(getattr(states, "requires_grad", False)))

    handles = [language.register_forward_pre_hook(begin, with_kwargs=True)]
    for number, layer in enumerate(language.layers):
        handles.append(layer.self_attn.register_forward_pre_hook(lambda *_, n=number: runs.update([n])))
    handles += [module.register_forward_hook(finish) for module in vision]
    ran: dict[str, Any] = {}
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()
        packages = (getattr(m.forward, "__module__", "").split(".")[0] for m in unwrap(model.model).modules())
        ran |= {
            "tokens": sum(passes),
            "layers": len(language.layers),
            "recomputed": sum(count > len(passes) for count in runs.values()),
            "vision_graph": any(graphs),
            "replaced": dict(Counter(name for name in packages if name not in STOCK)),
        }


def _language_and_vision(model: SupervisedModel) -> tuple[Any, list[nn.Module]]:
    """The language model without its head, and the modules that see pictures."""
    language: Any = model.backbone.language_model(model.model)
    children = unwrap(model.model).model.children()
    return language, [child for child in children if child is not language]


def _parts(model: SupervisedModel) -> Iterator[tuple[nn.Module, str]]:
    inner = unwrap(model.model)
    language, vision = _language_and_vision(model)
    yield from ((layer, "decoder") for layer in language.layers)
    yield from ((module, "vision") for module in vision)
    yield inner.get_output_embeddings(), "lm head"
    for name, module in inner.named_modules():
        if ("lora_A." in name or "lora_B." in name) and isinstance(module, nn.Linear):
            yield module, "adapters"
    if model.supervision is not None:
        yield model.supervision, "geometric loss"
        yield from ((layer, "heads") for layer in model.supervision.by_layer.values())


def _add_range(module: nn.Module, part: str) -> Iterator[Any]:
    entered: list[record_function] = []

    def enter(*_: Any) -> None:
        entered.append(record_function(RANGE + part))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    yield module.register_forward_pre_hook(enter)
    # Checkpointing leaves a layer by an exception, as soon as it has recomputed what it needs.
    yield module.register_forward_hook(leave, always_call=True)


def seconds_by_part(measured: profile) -> tuple[dict[str, float], list[str]]:
    """Seconds of each part (of the GPU, where there is one), and the attention operations of the decoder."""
    events = list(events_by_part(measured))
    on_gpu = any(event.self_device_time_total for _, event in events)
    seconds: dict[str, float] = defaultdict(float)
    for part, event in events:
        seconds[part] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    operations = dict.fromkeys(event.name for part, event in events if part == "attention" and _is_attention(event))
    return {part: seconds[part] for part in PARTS if seconds[part]}, list(operations)


def kernels_by_part(measured: profile, most: int = 8) -> dict[str, list[tuple[str, float, int]]]:
    """The kernels of each part that take longest: name, milliseconds, launches. Empty without a GPU."""
    spent: dict[str, Counter[str]] = defaultdict(Counter)
    launches: Counter[tuple[str, str]] = Counter()
    for part, event in events_by_part(measured):
        for kernel in event.kernels:
            spent[part][kernel.name] += kernel.duration
            launches[part, kernel.name] += 1
    return {
        part: [(name[:80], spent[part][name] / 1e3, launches[part, name]) for name, _ in spent[part].most_common(most)]
        for part in PARTS
        if part in spent
    }


def events_by_part(measured: profile) -> Iterator[tuple[str, Any]]:
    """Each operation with its part."""
    every = [event for event in measured.events() or [] if event.device_type == DeviceType.CPU]
    events = [event for event in every if event.name not in OVERHEAD]
    forward = _forward_operations(events)
    for event in events:
        part = _part_of(event, forward)
        yield "norms, activations" if part == "decoder" and event.name not in PRODUCTS else part, event


def _is_attention(event: Any) -> bool:
    """The operation itself, not the node of its backward."""
    return event.name.startswith(ATTENTION)


def _forward_operations(events: list[Any]) -> dict[NodeKey, Any]:
    """The operation that made each node of the graph: the last one to carry its number."""
    forward: dict[NodeKey, Any] = {}
    for event in events:
        if event.sequence_nr >= 0 and not _runs_node(event):
            key = (event.thread, event.sequence_nr)
            if key not in forward or event.time_range.start >= forward[key].time_range.start:
                forward[key] = event
    return forward


def _runs_node(event: Any) -> bool:
    """Nodes run under their engine's event and one of their own, both with the number of their forward."""
    parent = event.cpu_parent
    return event.name.startswith(NODE) or (parent is not None and parent.name.startswith(NODE))


def _part_of(event: Any, forward: dict[NodeKey, Any], passes: int = 0) -> str:
    """The innermost range around an event, or, of a node that runs backward, around the operation that made it."""
    attention = False
    while event is not None:
        if event.name.startswith(RANGE):
            part: str = event.name.removeprefix(RANGE)
            return "attention" if attention and part == "decoder" else part
        if event.name.startswith(OPTIMISER):
            return "optimiser"
        attention |= _is_attention(event)
        if event.name.startswith(NODE):
            origin = forward.get((event.fwd_thread, event.sequence_nr))
            # A backward pass inside a backward pass leads back twice at most: recomputation, then its forward.
            return "rest" if origin is None or passes >= 4 else _part_of(origin, forward, passes + 1)
        event = event.cpu_parent
    return "rest"

"""What a model's layers say about its visual tokens, handed over layer by layer while the model runs.

Three kinds of features. `hidden`: the state after a decoder layer. `head`: that state seen through the layer's
correspondence head. `qk`: the layer's query and key states (paper, App. C), a query of one frame being compared with
the keys of another.

With grouped-query attention there are more query heads than key heads and the two cannot be compared as they are, so
both are averaged over their heads. Where each query head has a key head of its own they are compared whole, all heads
side by side. `rope="before"` takes the outputs of the projections: what is at a place, wherever the place is.
`rope="after"` takes what the attention really multiplies.

Nothing is kept here. A consumer is called the moment a layer's features exist, and when it returns they are gone: 28
layers take the memory of one. Knows modules and hooks through a `Backbone`; must not know what features are used for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gasp_fast.backbones import AttentionShape, Backbone
from gasp_fast.supervision.heads import CorrespondenceHeads

Kind = Literal["head", "qk", "hidden"]
KINDS: tuple[Kind, ...] = ("head", "qk", "hidden")  # in the order of their interest: the first is the report's own
Rope = Literal["before", "after"]
Consumer = Callable[[Kind, int, Tensor, Tensor], None]  # kind, layer from 0, queries [N, D], keys [N, D]


def layers_of(kind: Kind, backbone: Backbone, heads: CorrespondenceHeads | None) -> list[int]:
    """The layers (from 0) that have features of a kind."""
    if kind != "head":
        return list(range(backbone.layer_count))
    if heads is None:
        raise ValueError('features = "head", but there are no heads; train some, or choose qk or hidden')
    return heads.layers


class FeatureTap:
    """Context in which each forward pass of `model` tells `consumer` the features of the tokens at `positions`.

    Where `queries` and `keys` are one and the same, so are the two tensors.
    """

    def __init__(
        self,
        backbone: Backbone,
        model: nn.Module,
        positions: Tensor,  # int64 [N], flat places in B * S
        consumer: Consumer,
        kinds: Sequence[Kind],
        heads: CorrespondenceHeads | None = None,
        rope: Rope = "before",
    ) -> None:
        if rope not in ("before", "after"):
            raise ValueError(f'rope = {rope!r}; choose "before" or "after"')
        self._backbone, self._model, self._heads = backbone, model, heads
        self._positions, self._consumer = positions, consumer
        self._kinds, self._rope = tuple(kinds), rope
        self._layers = {kind: set(layers_of(kind, backbone, heads)) for kind in self._kinds}
        self._exit = ExitStack()

    def __enter__(self) -> FeatureTap:
        with ExitStack() as stack:  # a failure half-way leaves no hook behind
            if {"hidden", "head"} & set(self._kinds):
                self._watch_states(stack)
            if "qk" in self._kinds and self._rope == "before":
                self._watch_projections(stack)
            elif "qk" in self._kinds:
                self._watch_attention(stack)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    # ---- the state after a layer is what enters the next module (see layer_capture.py) -------------------------------

    def _watch_states(self, stack: ExitStack) -> None:
        _, *following = self._backbone.decoder_layers(self._model)
        for layer, module in enumerate([*following, self._backbone.final_norm(self._model)]):
            handle = module.register_forward_pre_hook(self._state_hook(layer), with_kwargs=True)
            stack.callback(handle.remove)

    def _state_hook(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = args[0] if args else kwargs["hidden_states"]
            tokens = state.flatten(0, 1).index_select(0, self._positions)  # [N, D]
            if layer in self._layers.get("hidden", ()):
                self._consumer("hidden", layer, tokens, tokens)
            if layer in self._layers.get("head", ()):
                assert self._heads is not None
                embeddings = self._heads(layer, tokens)
                self._consumer("head", layer, embeddings, embeddings)

        return hook

    # ---- queries and keys as the projections make them ---------------------------------------------------------------

    def _watch_projections(self, stack: ExitStack) -> None:
        for layer in self._layers["qk"]:
            attention = self._backbone.attention(self._model, layer)
            found: dict[str, Tensor] = {}
            for name in ("q_proj", "k_proj"):
                hook = self._projection_hook(layer, name, found)
                stack.callback(getattr(attention, name).register_forward_hook(hook).remove)

    def _projection_hook(self, layer: int, name: str, found: dict[str, Tensor]) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:  # output [B, S, heads * head_dim]
            found[name] = output.flatten(0, 1).index_select(0, self._positions)
            if len(found) == 2:  # whichever of the two comes last
                self._tell_queries_and_keys(layer, found.pop("q_proj"), found.pop("k_proj"))

        return hook

    # ---- queries and keys as the attention takes them ----------------------------------------------------------------

    def _watch_attention(self, stack: ExitStack) -> None:
        """Stand in for transformers' attention function, which every model calls with its rotated states."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        layer_of = {self._backbone.attention(self._model, layer): layer for layer in self._layers["qk"]}
        name = next(iter(layer_of)).config._attn_implementation
        if name not in ALL_ATTENTION_FUNCTIONS:
            raise ValueError(f'rope = "after" cannot watch attention = {name!r}; load the model with attention="sdpa"')
        original = ALL_ATTENTION_FUNCTIONS[name]

        def watching(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            if module in layer_of:  # [B, heads, S, head_dim]
                batch, place = self._positions // query.shape[2], self._positions % query.shape[2]
                rows = (states[batch, :, place].flatten(1) for states in (query, key))
                self._tell_queries_and_keys(layer_of[module], *rows)
            return original(module, query, key, *args, **kwargs)

        replaced = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)  # somebody else may stand in already
        ALL_ATTENTION_FUNCTIONS[name] = watching

        def restore() -> None:
            if replaced is None:
                del ALL_ATTENTION_FUNCTIONS[name]
            else:
                ALL_ATTENTION_FUNCTIONS[name] = replaced

        stack.callback(restore)

    def _tell_queries_and_keys(self, layer: int, query: Tensor, key: Tensor) -> None:
        self._consumer("qk", layer, *comparable(query, key, self._backbone.attention_shape))


def comparable(query: Tensor, key: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """Queries `[N, Hq * d]` and keys `[N, Hk * d]` in one width: whole if `Hq = Hk`, else the means over heads."""
    if shape.query_heads == shape.key_heads:
        return query, key
    return (
        query.unflatten(-1, (shape.query_heads, shape.head_dim)).mean(-2),
        key.unflatten(-1, (shape.key_heads, shape.head_dim)).mean(-2),
    )


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

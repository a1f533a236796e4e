"""Features of the visual tokens, layer by layer, from one forward pass of the model.

Three kinds of features:

- `hidden`: the hidden state after a decoder layer.
- `head`: the embedding that the layer's correspondence head makes of what it was trained to read: that state, or one
  through a norm (`layer_capture.py`).
- `qk`: the query and key states of the layer's attention (paper, App. C). Queries of one frame are compared with keys
  of another. With grouped-query attention there are more query heads than key heads, so both are averaged over their
  heads. With as many key heads as query heads all heads are compared side by side. `rope="before"` takes the outputs
  of the projections (and of the norms behind them, as in Qwen3-VL), which do not depend on the position; `rope="after"`
  takes what the attention multiplies.

A consumer can also have `groups`: the same queries and keys of each head group by itself. A group is a key head with
the query heads that share it; their queries are averaged.

No features are stored. The consumer is called as soon as a layer's features are computed and they are freed when it
returns, so 28 layers need the memory of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gasp_fast.backbones import AttentionShape, Backbone
from gasp_fast.supervision.heads import CorrespondenceHeads
from gasp_fast.supervision.layer_capture import HeadInput, LayerCapture, normed
from gasp_fast.supervision.live_projections import by_group, comparable, head_norm

from .evaluated_model import EvaluatedModel

Kind = Literal["head", "qk", "hidden"]
KINDS: tuple[Kind, ...] = ("head", "qk", "hidden")  # of those measured, the first leads the report
Captured = Literal["head", "qk", "hidden", "groups"]
Rope = Literal["before", "after"]
# Kind, layer from 0, queries and keys: both [N, D], or [G, N, D] of `G` head groups.
Consumer = Callable[[Captured, int, Tensor, Tensor], None]


def layers_with(kind: Kind, backbone: Backbone, heads: CorrespondenceHeads | None) -> list[int]:
    """The layers (from 0) that have features of a kind."""
    if kind != "head":
        return list(range(backbone.layer_count))
    if heads is None:
        raise ValueError('features = "head", but there are no heads; train some, or choose qk or hidden')
    return heads.layers


def run_with_features(
    evaluated: EvaluatedModel, batch: dict[str, Any], consumer: Consumer, kinds: Sequence[Captured], rope: Rope
) -> None:
    """Runs the model once on a collated batch and calls `consumer` with each layer's features of the visual tokens.

    For `hidden` and `head`, queries and keys are the same tensor. Only the last position's logits are computed.
    """
    if rope not in ("before", "after"):
        raise ValueError(f'rope = {rope!r}; choose "before" or "after"')
    skipped = ("matches", "visual_positions", "labels")
    inputs = {
        name: value.to(evaluated.device, non_blocking=True) for name, value in batch.items() if name not in skipped
    }
    positions = batch["visual_positions"].to(evaluated.device)  # int64 [N], flat indices into B * S
    evaluated.backbone.check_inputs(evaluated.model, inputs)
    # Where a trainer has switched gradients off, ZeRO-3 must not gather weights into tensors of inference_mode.
    with torch.inference_mode() if torch.is_grad_enabled() else nullcontext(), ExitStack() as hooks:
        for kind in kinds:
            if kind == "head" or kind == "hidden":
                hooks.enter_context(_hidden_capture(evaluated, positions, consumer, kind))
        if "qk" in kinds or "groups" in kinds:
            capture = _capture_projections if rope == "before" else _capture_attention
            capture(hooks, evaluated, positions, _queries_and_keys(consumer, kinds, evaluated.backbone.attention_shape))
        evaluated.model(**inputs, use_cache=False, logits_to_keep=1)


def _hidden_capture(
    evaluated: EvaluatedModel, positions: Tensor, consumer: Consumer, kind: Literal["head", "hidden"]
) -> LayerCapture:
    """Features `hidden` or `head`."""
    backbone, model = evaluated.backbone, evaluated.model
    layers, heads = layers_with(kind, backbone, evaluated.heads), evaluated.heads if kind == "head" else None

    def on_state(layer: int, state: Tensor) -> None:  # state [B, S, D]
        tokens = normed(state.flatten(0, 1).index_select(0, positions), capture.norm(layer))  # [N, D]
        features = tokens if heads is None else heads(layer, tokens)
        consumer(kind, layer, features, features)

    decoder_layers: Any = backbone.decoder_layers(model)
    read: HeadInput = "output" if heads is None else heads.reads
    capture = LayerCapture(decoder_layers, backbone.final_norm(model), layers, on_state, read)
    return capture


QueriesAndKeys = Callable[[int, Tensor, Tensor], None]  # layer, queries [N, Hq * d], keys [N, Hk * d]


def _queries_and_keys(consumer: Consumer, kinds: Sequence[Captured], shape: AttentionShape) -> QueriesAndKeys:
    def give(layer: int, query: Tensor, key: Tensor) -> None:
        if "qk" in kinds:
            consumer("qk", layer, *comparable(query, key, shape.head_dim))
        if "groups" in kinds:
            consumer("groups", layer, *by_group(query, key, shape.head_dim))

    return give


def _capture_projections(hooks: ExitStack, evaluated: EvaluatedModel, positions: Tensor, give: QueriesAndKeys) -> None:
    """Queries and keys before the rotary embedding: outputs of the projections, or of the norms behind them."""
    backbone = evaluated.backbone
    head_dim = backbone.attention_shape.head_dim

    def collect(
        layer: int, name: str, outputs: dict[str, Tensor], module: nn.Module, args: Any, output: Tensor
    ) -> None:
        # A projection's [B, S, heads * head_dim], or a norm's [B, S, heads, head_dim].
        outputs[name] = output.flatten(2).flatten(0, 1).index_select(0, positions)  # [N, heads * head_dim]
        if len(outputs) == 2:
            give(layer, outputs.pop("q"), outputs.pop("k"))

    for layer in range(backbone.layer_count):
        attention: Any = backbone.attention(evaluated.model, layer)
        outputs: dict[str, Tensor] = {}
        for name, projection in (("q", attention.q_proj), ("k", attention.k_proj)):
            last = head_norm(attention, f"{name}_norm", head_dim) or projection
            hooks.callback(last.register_forward_hook(partial(collect, layer, name, outputs)).remove)


def _capture_attention(hooks: ExitStack, evaluated: EvaluatedModel, positions: Tensor, give: QueriesAndKeys) -> None:
    """Queries and keys after the rotary embedding: the inputs of transformers' attention function.

    All models of transformers look their attention function up by name in one table. It is replaced there for the
    forward pass by a function that hands on its inputs and calls the original.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    backbone = evaluated.backbone
    layer_of = {backbone.attention(evaluated.model, layer): layer for layer in range(backbone.layer_count)}
    implementation = next(iter(layer_of)).config._attn_implementation
    if implementation not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(
            f'rope = "after" does not support attention = {implementation!r}; load the model with attention="sdpa"'
        )
    original = ALL_ATTENTION_FUNCTIONS[implementation]

    def attention(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module in layer_of:  # query and key [B, heads, S, head_dim]
            batch, place = positions // query.shape[2], positions % query.shape[2]
            q, k = (states[batch, :, place].flatten(1) for states in (query, key))  # [N, heads * head_dim]
            give(layer_of[module], q, k)
        return original(module, query, key, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[implementation] = attention
    hooks.callback(ALL_ATTENTION_FUNCTIONS.__setitem__, implementation, original)

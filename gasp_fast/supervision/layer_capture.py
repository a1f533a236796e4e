"""Taking the decoder layers' hidden states out of a forward pass that somebody else runs.

Knows modules, hooks and positions; must not know a model's layout: a backbone names the layers and the final norm.

The state after layer `l` is read where it enters the next module (layer `l + 1`, or the final norm after the last
layer), not where it leaves layer `l`. That makes the capture right under every kind of gradient checkpointing:

- What enters a module is the tensor of the outer graph even when the module's body runs under checkpointing. What
  leaves it need not be: transformers up to 5.18 checkpoint a layer's whole `__call__`, so an output hook sees the
  tensor of the inner pass, and under reentrant checkpointing that pass has no graph and no gradient would flow.
- The recomputation during backward enters the same modules again, with detached copies. The first tensor of a
  forward pass wins and later ones are ignored, so the number of times a hook fires does not matter.
- The hooks do no arithmetic. An operation inside a checkpointed region is recorded and has to be repeated
  identically; picking the visual tokens out therefore happens when they are asked for, outside.

The state after the last layer is, by the same token, the one before the final norm. (transformers' own
`hidden_states[-1]` is the one after it.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class LayerCapture:
    """Context in which one forward pass of a model leaves its hidden states behind.

    with LayerCapture(backbone.decoder_layers(model), backbone.final_norm(model), layers=[17, 18]) as capture:
        model(**inputs)
    visual = capture.tokens(17, positions)  # [N, D]
    """

    def __init__(self, decoder_layers: Sequence[nn.Module], final_norm: nn.Module, layers: Iterable[int] | None = None):
        count = len(decoder_layers)
        wanted = list(range(count)) if layers is None else sorted(set(layers))
        for layer in wanted:
            if not 0 <= layer < count:
                raise ValueError(f"layers contains {layer}, but the model has decoder layers 0 to {count - 1}")
        following = [*decoder_layers[1:], final_norm]
        self._followers = {layer: following[layer] for layer in wanted}
        self._states: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> LayerCapture:
        self.clear()
        for layer, module in self._followers.items():
            self._handles.append(module.register_forward_pre_hook(self._keeper(layer), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keeper(self, layer: int) -> Any:
        def keep_first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._states.setdefault(layer, args[0] if args else kwargs["hidden_states"])

        return keep_first

    @property
    def layers(self) -> list[int]:
        return list(self._followers)

    def hidden(self, layer: int) -> Tensor:
        """Output of a decoder layer, `[B, S, D]`, part of the graph of the forward pass."""
        if layer not in self._followers:
            raise ValueError(f"layer = {layer} is not captured; this capture holds layers {self.layers}")
        if layer not in self._states:
            raise ValueError(
                f"layer = {layer} has no hidden state yet; run the model inside the capture's context first"
            )
        return self._states[layer]

    def tokens(self, layer: int, positions: Tensor) -> Tensor:
        """The rows of `hidden(layer)` at flat positions `[N]` into `B * S`: `[N, D]`."""
        return self.hidden(layer).flatten(0, 1).index_select(0, positions)

    def clear(self) -> None:
        """Forget the states: before another forward pass in the same context, and to free their memory."""
        self._states.clear()

"""`LayerCapture`: take the hidden states of decoder layers out of a model's forward pass, with forward hooks.

The state after layer `l` is read where it enters the next module (layer `l + 1`, or the final norm after the last
layer), not where it leaves layer `l`. This makes the capture correct under every kind of gradient checkpointing:

- The tensor that enters a module belongs to the outer graph even when the module's body runs under checkpointing. The
  tensor that leaves it may not: transformers up to 5.18 checkpoint a layer's whole `__call__`, so an output hook sees
  the tensor of the inner pass, and under reentrant checkpointing that pass has no graph and no gradient would flow.
- The recomputation during backward enters the same modules again, with detached copies. The first tensor of a
  forward pass is kept and later ones are ignored, so it does not matter how often a hook runs.
- The hooks do no arithmetic. An operation inside a checkpointed region is recorded and must be repeated identically;
  therefore the visual tokens are selected outside, when `tokens` is called, and norms are applied there.

It follows that the state after the last layer is the one before the final norm. (transformers' own
`hidden_states[-1]` is the one after it.)

What is read of a layer (`HeadInput`):

    output               its output
    output_normed        its output through the norm that follows: the next layer's input norm, or the final norm
    layer_input_normed   its input through its own input norm: what its q, k and v projections multiply
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

HeadInput = Literal["output", "output_normed", "layer_input_normed"]
Place = tuple[int, HeadInput]  # a layer, and what is read of it


class LayerCapture:
    """Context manager that keeps the hidden states of one forward pass.

    with LayerCapture(backbone.decoder_layers(model), backbone.final_norm(model), layers=[17, 18]) as capture:
        model(**inputs)
    visual = capture.tokens(17, positions)  # [N, D]

    `layers` are indices from 0; None captures all decoder layers. What is read of each is `read`; `inputs` are layers
    of which `layer_input_normed` is captured besides. With `on_state`, each state is passed to `on_state(layer, state)`
    as soon as it is computed and is not kept. Use it only without a backward pass: the recomputation of gradient
    checkpointing would call it again.
    """

    def __init__(
        self,
        decoder_layers: Sequence[nn.Module],
        final_norm: nn.Module,
        layers: Iterable[int] | None = None,
        on_state: Callable[[int, Tensor], None] | None = None,
        read: HeadInput = "output",
        inputs: Iterable[int] = (),
    ) -> None:
        self._on_state = on_state
        self._read: HeadInput = read
        count = len(decoder_layers)
        self._layers = list(range(count)) if layers is None else sorted(set(layers))
        places: list[Place] = [(layer, read) for layer in self._layers]
        places += [(layer, "layer_input_normed") for layer in inputs]
        self._entered: dict[Place, nn.Module] = {}  # the module whose input is kept
        self._norms: dict[Place, nn.Module] = {}
        for layer, what in places:
            if not 0 <= layer < count:
                raise ValueError(f"layers contains {layer}, but the model has decoder layers 0 to {count - 1}")
            entered = decoder_layers if what == "layer_input_normed" else [*decoder_layers[1:], final_norm]
            self._entered[layer, what] = module = entered[layer]
            if what != "output":
                self._norms[layer, what] = final_norm if module is final_norm else _input_norm(module)
        self._states: dict[Place, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> LayerCapture:
        self.clear()
        for place, module in self._entered.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(place), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, place: Place) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = args[0] if args else kwargs["hidden_states"]
            if self._on_state is None:
                self._states.setdefault(place, state)  # the first one of a forward pass
            else:
                self._on_state(place[0], state)

        return hook

    @property
    def empty(self) -> bool:
        """Whether no state is kept: before a forward pass, and after `clear`."""
        return not self._states

    @property
    def layers(self) -> list[int]:
        return list(self._layers)

    def hidden(self, layer: int, read: HeadInput | None = None) -> Tensor:
        """Output of a decoder layer, or its input, before any norm: `[B, S, D]`, part of the forward pass's graph.

        `read` is what is read of the layer; None: what the capture was made to read.
        """
        place = layer, read or self._read
        if place not in self._entered:
            held = [layer for layer, what in self._entered if what == place[1]]
            raise ValueError(f"layer = {layer} is not captured; this capture holds layers {held}")
        if place not in self._states:
            raise ValueError(
                f"layer = {layer} has no hidden state yet; run the model inside the capture's context first"
            )
        return self._states[place]

    def norm(self, layer: int, read: HeadInput | None = None) -> nn.Module | None:
        """The norm through which the state is read; None: it is read as it is."""
        return self._norms.get((layer, read or self._read))

    def tokens(self, layer: int, positions: Tensor, read: HeadInput | None = None) -> Tensor:
        """What is read at flat positions `[N]` into `B * S`: rows of `hidden(layer)`, normed if so chosen, `[N, D]`."""
        rows = self.hidden(layer, read).flatten(0, 1).index_select(0, positions)
        return normed(rows, self.norm(layer, read))

    def clear(self) -> None:
        """Drop the states: before another forward pass in the same context, or to free their memory."""
        self._states.clear()


def normed(rows: Tensor, norm: nn.Module | None) -> Tensor:
    """`rows` through a norm of the model.

    Without the hooks of the norm: they are for the model's own pass, and one of them may be the capture's.
    """
    return rows if norm is None else norm.forward(rows)


def _input_norm(layer: nn.Module) -> nn.Module:
    norm = getattr(layer, "input_layernorm", None)
    if norm is None:
        raise ValueError(f"{type(layer).__name__} has no input_layernorm to read through; use heads.input=output")
    return norm

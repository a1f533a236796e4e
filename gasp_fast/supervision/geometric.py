"""`GeometricSupervision`: heads on hidden states and their loss, computed and differentiated some layers at a time.

A head is a correspondence head (`heads.py`), or the layer's own projections (`live_projections.py`).

A supervised layer takes the hidden state `[B, S, hidden]` of its decoder layer, selects the rows of the `N` visual
tokens, norms them if its head reads them so, embeds them with its head and compares the embeddings. The result is a
scalar, so its gradients can be computed before the model's backward pass: those with respect to the rows and to the
weights of head and norm are computed within the forward pass, on a graph that is freed there. Only those gradients are
kept, and the backward pass multiplies them by the gradient of the scalar. Hence

- the head activations and embeddings of few layers exist at a time, however many layers are supervised: of as many as
  fit `GROUP_BYTES`, or of one. These layers share a call of the loss: where frames have few tokens, a call of each
  layer would take the host longer than the GPU;
- the loss is computed once, not again in backward, and its metrics need no pass of their own;
- gradient checkpointing of the model never recomputes any of this.

Every supervised layer runs its head on every batch. A batch without matches has `N = 0` rows; the head then runs on
an empty tensor, and its weights receive a gradient of zero (not None). So the ranks of a distributed run execute the
same modules, whatever their batches contain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gasp_fast.kernels.scaling import place_scaled
from gasp_fast.loss.config import LossConfig
from gasp_fast.loss.function import gasp_loss
from gasp_fast.loss.matches import Matches
from gasp_fast.loss.metric import in_metric

from .heads import CorrespondenceHead, CorrespondenceHeads, by_coordinates, coordinates_width, fewest_tokens
from .layer_capture import HeadInput, LayerCapture, normed
from .live_projections import Compared, LiveProjections
from .similarity import mean_cosines

# Hidden rows and embeddings of the layers that share a call of the loss; heads and loss need two to three times as much
# beside them. 10 layers of 16 frames of 144 tokens (2,304 x 4,096 in bf16: 38 MB), 2 of four such sequences at once,
# 1 layer of 24 frames of 576 tokens. A call costs the host of an H200 about a millisecond beside its products.
GROUP_BYTES = 360 << 20

LayerReduction = Literal["mean", "sum"]


class GeometricSupervision(nn.Module):
    """One supervised layer for each head, by the index of its decoder layer; then one for each of `live`.

    With `learnable_temperature`, `config.temperature` is the initial value of a parameter shared by all layers.
    `embeddings` is the type in which the loss compares them; None: as the heads return them. The losses of the layers
    are reduced by `layer_reduction`.
    """

    def __init__(
        self,
        heads: CorrespondenceHeads | None,
        config: LossConfig | None = None,
        learnable_temperature: bool = False,
        embeddings: torch.dtype | None = None,
        group_bytes: int = GROUP_BYTES,
        layer_reduction: LayerReduction = "mean",
        live: Sequence[LiveProjections] = (),
    ) -> None:
        super().__init__()
        self.config = LossConfig() if config is None else config
        self.reads: HeadInput = "output" if heads is None else heads.reads
        by_layer: dict[str, SupervisedLayer | LiveProjections] = {}
        if heads is not None:
            all_heads: Any = heads.by_layer.items()
            by_layer = {name: SupervisedLayer(int(name), head, heads.reads, embeddings) for name, head in all_heads}
        by_layer |= {f"{some.layer}-{some.kind}": some for some in live}
        if not by_layer:
            raise ValueError("no layer is supervised; give heads, or live projections")
        share = 1 / len(by_layer) if layer_reduction == "mean" else 1.0
        self.by_layer = SupervisedLayers(by_layer, group_bytes, share)
        self.log_temperature = None
        if learnable_temperature:  # [1], not []: DeepSpeed cannot send 0-dim parameters
            self.log_temperature = nn.Parameter(torch.tensor([self.config.temperature]).log())

    @property
    def heads(self) -> CorrespondenceHeads | None:
        """The correspondence heads themselves, without the loss; the modules are shared."""
        heads = {one.layer: one.head for one in self.by_layer.supervised if isinstance(one, SupervisedLayer)}
        return CorrespondenceHeads(heads, self.reads) if heads else None

    @property
    def layers(self) -> list[int]:
        """The decoder layer of each supervised one, in the order of the losses."""
        return [one.layer for one in self.by_layer.supervised]

    @property
    def highest(self) -> int:
        """The highest decoder layer whose output is supervised, itself or through layers above; -1: none."""
        return max(one.layer - (one.reads == "layer_input_normed") for one in self.by_layer.supervised)

    @property
    def live_weights(self) -> list[nn.Parameter]:
        """Weights of the model's projections that are supervised themselves."""
        return [
            weight for one in self.by_layer.supervised if isinstance(one, LiveProjections) for weight in one.weights()
        ]

    def capture(self, decoder_layers: Sequence[nn.Module], final_norm: nn.Module) -> LayerCapture:
        """A capture of what the heads read."""
        of_heads = [one.layer for one in self.by_layer.supervised if isinstance(one, SupervisedLayer)]
        live = [one.layer for one in self.by_layer.supervised if isinstance(one, LiveProjections)]
        return LayerCapture(decoder_layers, final_norm, of_heads, read=self.reads, inputs=live)

    def forward(self, capture: LayerCapture, positions: Tensor, matches: Matches) -> dict[str, Tensor]:
        """`loss`, the mean or the sum over layers; and `corr`, `depth`, `pck`, `cosine` [L] without gradient.

        `capture` holds what the heads read (`self.capture`). `positions` [N] are the visual tokens that `matches`
        number, as flat indices into `B * S`. PCK is the share of matches whose arg-max is within two patches; NaN if
        the matches have no `token_xy`. The cosine is the mean of pairs of tokens (`similarity.py`).
        """
        if self.log_temperature is None:  # filled on the device; `torch.tensor` would copy it there and wait
            temperature = torch.full((), self.config.temperature, device=positions.device)
        else:
            temperature = self.log_temperature.exp()[0].to(positions.device)
        states = [capture.hidden(one.layer, one.reads) for one in self.by_layer.supervised]
        norms = [capture.norm(one.layer, one.reads) for one in self.by_layer.supervised]
        loss, corr, depth, pck, cosine = self.by_layer(positions, matches, temperature, self.config, norms, *states)
        return {"loss": loss, "corr": corr, "depth": depth, "pck": pck, "cosine": cosine}


class SupervisedLayers(nn.ModuleDict):
    """The heads of all supervised layers, and the loss of their embeddings, computed in groups of layers.

    Must be declared a leaf module to ZeRO-3 (`deepspeed.utils.set_z3_leaf_modules`). ZeRO-3 gathers and frees weights
    module by module, but `_GroupLoss` differentiates the heads' weights outside the heads' own forward. A leaf's
    weights stay gathered for its whole forward pass. All heads form one leaf, because processes must gather alike, and
    the groups of a process depend on the tokens of its batch. States are arguments of their own, not a list: in a list
    PyTorch's backward hooks would not see them, and ZeRO-3 would reduce gradients before they are computed.
    """

    def __init__(
        self, by_layer: Mapping[str, SupervisedLayer | LiveProjections], group_bytes: int, share: float
    ) -> None:
        super().__init__(by_layer)
        self.group_bytes = group_bytes
        self.share = share  # of each layer in the loss

    @property
    def supervised(self) -> list[SupervisedLayer | LiveProjections]:
        layers: Any = self.values()
        return list(layers)

    def forward(
        self,
        positions: Tensor,
        matches: Matches,
        temperature: Tensor,
        config: LossConfig,
        norms: Sequence[nn.Module | None],  # through which the heads read the states
        *states: Tensor,
    ) -> tuple[Tensor, ...]:
        """The loss of hidden states [B, S, hidden]; corr, depth, PCK and cosine [L] of each, without gradient."""
        layers = self.supervised
        shares = torch.full((len(layers),), self.share, device=positions.device)  # [L]
        terms = []
        for group in self._groups(layers, states, len(positions)):
            inputs = layers[group], norms[group], matches, config, shares[group]
            if torch.is_grad_enabled():
                weights = [weight for layer in layers[group] for weight in layer.weights()]
                weights += [weight for norm in norms[group] if norm is not None for weight in norm.parameters()]
                terms.append(_GroupLoss.apply(*inputs, positions, temperature, *states[group], *weights))
            else:
                terms.append(_loss_of_rows(*inputs, temperature, _rows(states[group], positions)))
        loss, *metrics = zip(*terms, strict=True)  # of each group
        return torch.stack(loss).sum(), *map(torch.cat, metrics)

    def _groups(
        self, layers: Sequence[SupervisedLayer | LiveProjections], states: Sequence[Tensor], tokens: int
    ) -> Iterator[slice]:
        """Neighbours of one kind and size, in as few groups as fit `group_bytes`, about equal, none of them empty."""
        kinds = [(type(layer), layer.sizes, layer.width) for layer in layers]
        for (*_, width), same in groupby(range(len(layers)), key=kinds.__getitem__):
            first, *others = same
            count, end = 1 + len(others), first + 1 + len(others)
            bytes_ = tokens * (states[first].shape[-1] + width) * states[first].element_size()  # of one layer
            groups = -(-count // max(1, self.group_bytes // max(1, bytes_)))
            size = -(-count // groups)
            yield from (slice(start, min(start + size, end)) for start in range(first, end, size))


class SupervisedLayer(nn.Module):
    """A correspondence head, what it reads, and the type in which the loss takes its embeddings."""

    parts = 1

    def __init__(self, layer: int, head: CorrespondenceHead, reads: HeadInput, embeddings: torch.dtype | None) -> None:
        super().__init__()
        self.layer, self.head, self.reads, self.embeddings = layer, head, reads, embeddings

    @property
    def compares_coordinates(self) -> bool:
        """Whether the loss takes the head's coordinates and their metric."""
        compute = self.head.second.compute
        embeddings = compute if self.embeddings is None else "bf16" if self.embeddings == torch.bfloat16 else ""
        return by_coordinates(*self.sizes, compute, embeddings)

    @property
    def sizes(self) -> tuple[int, int]:
        """Inner and outer width of the head. Only layers of the same sizes share a call of the loss."""
        return self.head.second.in_features, self.head.second.out_features

    @property
    def width(self) -> int:
        """Of what the loss compares."""
        inner, outer = self.sizes
        return coordinates_width(inner) if self.compares_coordinates else outer

    def weights(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def forward(self, rows: Tensor) -> Compared:
        """Rows [N, hidden] to what the loss compares, of anchors and candidates alike. Of few it is the embeddings."""
        if self.compares_coordinates and len(rows) >= fewest_tokens(*self.sizes):
            coordinates, metric = self.head.coordinates(rows)
            return Compared(coordinates[None], metric=metric[None])
        embeddings: Tensor = self.head(rows)
        return Compared((embeddings if self.embeddings is None else embeddings.to(self.embeddings))[None])


def _rows(states: Sequence[Tensor], positions: Tensor) -> list[Tensor]:
    """The rows [N, hidden] at flat positions of each hidden state [B, S, hidden]."""
    return [state.flatten(0, 1).index_select(0, positions) for state in states]


def _loss_of_rows(
    layers: Sequence[SupervisedLayer | LiveProjections],
    norms: Sequence[nn.Module | None],
    matches: Matches,
    config: LossConfig,
    shares: Tensor,
    temperature: Tensor,
    rows: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The sum of the losses of a group of layers, each times its share; and corr, depth, PCK and cosine [G] of each.

    `rows` are G tensors [N, hidden], `shares` [G]. The layers are alike, in particular in their `parts`.
    """
    made = [layer(normed(some, norm)) for layer, norm, some in zip(layers, norms, rows, strict=True)]
    embeddings, keys, metric = (_stacked(same) for same in zip(*made, strict=True))
    assert embeddings is not None
    compared = embeddings if metric is None else in_metric(embeddings, metric)
    parts = layers[0].parts
    out = gasp_loss(
        compared,
        matches,
        keys=keys,
        temperature=temperature,
        negatives=config.negatives,
        other_targets=config.other_targets,
        corr_weight=config.corr_weight,
        depth_weight=config.depth_weight,
        eps=config.eps,
        layer_weights=shares if parts == 1 else (shares / parts).repeat_interleave(parts),
        return_metrics=True,
        backend=config.backend,
        workspace=config.workspace,
    )
    assert out.metrics is not None
    corr, depth = out.corr_per_layer, out.depth_per_layer
    pck = torch.full_like(corr, torch.nan) if out.metrics.pck is None else out.metrics.pck
    metrics = corr, depth, pck, mean_cosines(compared, matches)  # [G * parts]
    return out.loss, *(metrics if parts == 1 else (metric.view(-1, parts).mean(1) for metric in metrics))


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """G of [parts, N, width] in one stack [G * parts, N, width]: only the layers of a stack are computed together."""
    some = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(some) if len(some) > 1 else some[0] if some else None


class _GroupLoss(torch.autograd.Function):
    """`_loss_of_rows` on the rows `positions` of hidden states, with its gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        layers: Sequence[SupervisedLayer | LiveProjections],
        norms: Sequence[nn.Module | None],
        matches: Matches,
        config: LossConfig,
        shares: Tensor,
        positions: Tensor,
        temperature: Tensor,
        *tensors: Tensor,  # a hidden state of each layer, and the weights of all
    ) -> tuple[Tensor, ...]:
        states, weights = tensors[: len(layers)], tensors[len(layers) :]
        needs_grad = ctx.needs_input_grad[6:]  # of temperature, states and weights
        with torch.enable_grad():
            # Detached: states and temperature have graphs of their own behind them, which must not be differentiated.
            rows = _rows([state.detach() for state in states], positions)
            rows = [some.requires_grad_(needed) for some, needed in zip(rows, needs_grad[1:], strict=False)]
            temperature = temperature.detach().requires_grad_(needs_grad[0])
            loss, *metrics = _loss_of_rows(layers, norms, matches, config, shares, temperature, rows)
            inputs = [x for x, needed in zip((temperature, *rows, *weights), needs_grad, strict=True) if needed]
            # Without matches the loss may not depend on the temperature: its gradient is then zero.
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        ctx.save_for_backward(positions, *gradients)
        ctx.states = [(state.shape, state.dtype) for state in states]
        metrics = [metric.detach() for metric in metrics]
        ctx.mark_non_differentiable(*metrics)
        return loss.detach(), *metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        positions, *gradients = ctx.saved_tensors
        saved, states = iter(gradients), len(ctx.states)
        found = [next(saved) if needed else None for needed in ctx.needs_input_grad[6:]]
        of_temperature = None if found[0] is None else found[0] * upstream
        of_states = [
            None if rows is None else _scattered(rows, upstream, positions, *state)
            for rows, state in zip(found[1 : 1 + states], ctx.states, strict=True)
        ]
        of_weights = [None if weight is None else weight * upstream for weight in found[1 + states :]]
        return *[None] * 6, of_temperature, *of_states, *of_weights


def _scattered(rows: Tensor, upstream: Tensor, positions: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Rows [N, hidden], times the upstream gradient, at their positions in a tensor [B, S, hidden] of zeros."""
    state = rows.new_zeros(shape, dtype=dtype)
    place_scaled(rows, upstream.float(), positions, state.flatten(0, 1))
    return state

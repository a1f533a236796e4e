"""Geometric supervision of decoder layers: heads on hidden states, and their loss streamed layer by layer.

Knows hidden states, heads and the loss; must not know which model made the states, nor how anything is trained.

A supervised layer sees the hidden state `[B, S, hidden]` that its decoder layer left behind, picks the rows of the
`N` visual tokens, embeds them, and compares the embeddings. All of that is a small graph with a scalar at its end, so
nobody has to wait for the big backward pass to differentiate it: the gradients with respect to the rows and to the
head's weights are computed right in the forward pass, by a graph that lives and dies inside it. What stays until
backward are those gradients, and backward only multiplies them with what arrives from above. Hence

- at most one layer's head activations and embeddings exist at a time, however many layers are supervised;
- the loss is computed once, not once more in backward, and its metrics cost no pass of their own;
- nothing in here is ever recomputed by gradient checkpointing, whichever kind the model uses.

Every supervised layer runs its head on every batch. A batch without matches has `N = 0` rows; the head then runs on
none of them, and its weights receive a gradient that is zero and is there. Ranks of a distributed run stay in step,
whatever their batches hold.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gasp_fast.loss.config import LossConfig
from gasp_fast.loss.function import gasp_loss
from gasp_fast.loss.matches import Matches

from .heads import CorrespondenceHeads
from .layer_capture import LayerCapture


class GeometricSupervision(nn.Module):
    """One supervised layer for each head, by the index of its decoder layer."""

    def __init__(
        self, heads: CorrespondenceHeads, loss: LossConfig | None = None, learnable_temperature: bool = False
    ) -> None:
        super().__init__()
        self.loss = LossConfig() if loss is None else loss
        self.by_layer = nn.ModuleDict({name: SupervisedLayer(head) for name, head in heads.by_layer.items()})
        # [1], not []: DeepSpeed cannot send 0-dim parameters.
        start = torch.tensor([self.loss.temperature]).log() if learnable_temperature else None
        self.log_temperature = None if start is None else nn.Parameter(start)

    @property
    def layers(self) -> list[int]:
        return [int(name) for name in self.by_layer]

    def forward(self, states: LayerCapture, positions: Tensor, matches: Matches) -> dict[str, Tensor]:
        """`loss`, the mean over layers; and `corr`, `depth`, `pck` [L] without gradient.

        `positions` [N] are the visual tokens that `matches` speaks of, as flat indices into `B * S`. PCK is the share
        of matches that are found within two patches.
        """
        fixed = self.log_temperature is None
        # A tensor on the device either way: a number would be copied there once for every layer.
        tau = torch.tensor(self.loss.temperature) if fixed else self.log_temperature.exp()[0]  # type: ignore[union-attr]
        tau = tau.to(positions.device)
        terms = [
            layer(states.hidden(int(name)), positions, matches, tau, self.loss) for name, layer in self.by_layer.items()
        ]
        loss, corr, depth, pck = (torch.stack(term) for term in zip(*terms, strict=True))  # [L] each
        return {"loss": loss.mean(), "corr": corr.detach(), "depth": depth.detach(), "pck": pck.detach()}


class SupervisedLayer(nn.Module):
    """A head, and the loss of the layer it sits on."""

    # ZeRO-3 gathers and frees weights module by module. The head's weights are differentiated by the function below,
    # which is not one of its modules, so they must stay gathered for the whole of this one: a "leaf" to ZeRO-3.
    _z3_leaf: ClassVar[bool] = True

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(
        self, hidden: Tensor, positions: Tensor, matches: Matches, temperature: Tensor, loss: LossConfig
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The layer's loss, and its corr, depth and PCK without gradient; all scalars."""
        if not torch.is_grad_enabled():
            rows = hidden.flatten(0, 1).index_select(0, positions)
            return _judged(self.head, rows, matches, temperature, loss)
        task = (self.head, matches, loss)
        return _LayerLoss.apply(task, positions, hidden, temperature, *self.head.parameters())


def _judged(
    head: nn.Module, rows: Tensor, matches: Matches, temperature: Tensor, loss: LossConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, corr, depth and PCK of hidden rows [N, hidden]."""
    out = gasp_loss(
        head(rows),
        matches,
        temperature=temperature,
        negatives=loss.negatives,
        corr_weight=loss.corr_weight,
        depth_weight=loss.depth_weight,
        return_metrics=True,
        backend=loss.backend,
    )
    assert out.metrics is not None
    pck = out.metrics.accuracy if out.metrics.pck is None else out.metrics.pck
    return out.loss, out.corr_per_layer[0], out.depth_per_layer[0], pck[0]


class _LayerLoss(torch.autograd.Function):
    """`_judged` with its gradients taken at once; see the top of the file."""

    @staticmethod
    def forward(ctx: Any, task: Any, positions: Tensor, hidden: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        head, matches, loss = task
        with torch.enable_grad():
            rows = hidden.detach().flatten(0, 1).index_select(0, positions)  # [N, hidden]
            rows.requires_grad_(ctx.needs_input_grad[2])
            # The temperature comes with a graph of its own behind it, which must not be walked from here.
            temperature = leaves[0].detach().requires_grad_(ctx.needs_input_grad[3])
            value, *told = _judged(head, rows, matches, temperature, loss)
            inputs = (rows, temperature, *leaves[1:])
            wanted = [tensor for tensor, want in zip(inputs, ctx.needs_input_grad[2:], strict=True) if want]
            # Without matches the depth term may not depend on the temperature: its gradient is then zero.
            gradients = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
        ctx.save_for_backward(positions, *gradients)
        ctx.like = (hidden.shape, hidden.dtype)
        told = [term.detach() for term in told]
        ctx.mark_non_differentiable(*told)
        return value.detach(), *told

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        positions, *gradients = ctx.saved_tensors
        found = iter(gradients)
        given = [next(found) * upstream if want else None for want in ctx.needs_input_grad[2:]]
        if given[0] is not None:
            shape, dtype = ctx.like
            whole = torch.zeros(shape, dtype=dtype, device=positions.device)  # [B, S, hidden]
            whole.flatten(0, 1).index_copy_(0, positions, given[0].to(dtype))
            given[0] = whole
        return None, None, *given

"""`GeometricSupervision`: heads on hidden states and their loss, computed and differentiated one layer at a time.

A supervised layer takes the hidden state `[B, S, hidden]` of its decoder layer, selects the rows of the `N` visual
tokens, embeds them with its head and compares the embeddings. The result is a scalar, so its gradients can be computed
before the model's backward pass: those with respect to the rows and to the head's weights are computed within the
forward pass, on a graph that is freed there. Only those gradients are kept, and the backward pass multiplies them by
the gradient of the scalar. Hence

- the head activations and embeddings of at most one layer exist at a time, however many layers are supervised;
- the loss is computed once, not again in backward, and its metrics need no pass of their own;
- gradient checkpointing of the model never recomputes any of this.

Every supervised layer runs its head on every batch. A batch without matches has `N = 0` rows; the head then runs on
an empty tensor, and its weights receive a gradient of zero (not None). So the ranks of a distributed run execute the
same modules, whatever their batches contain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gasp_fast.loss.config import LossConfig
from gasp_fast.loss.function import gasp_loss
from gasp_fast.loss.matches import Matches

from .heads import CorrespondenceHeads
from .layer_capture import LayerCapture


class GeometricSupervision(nn.Module):
    """One supervised layer for each head, by the index of its decoder layer.

    With `learnable_temperature`, `config.temperature` is the initial value of a parameter shared by all layers.
    """

    def __init__(
        self, heads: CorrespondenceHeads, config: LossConfig | None = None, learnable_temperature: bool = False
    ) -> None:
        super().__init__()
        self.config = LossConfig() if config is None else config
        self.by_layer = nn.ModuleDict({name: SupervisedLayer(head) for name, head in heads.by_layer.items()})
        self.log_temperature = None
        if learnable_temperature:  # [1], not []: DeepSpeed cannot send 0-dim parameters
            self.log_temperature = nn.Parameter(torch.tensor([self.config.temperature]).log())

    @property
    def layers(self) -> list[int]:
        return [int(name) for name in self.by_layer]

    def forward(self, capture: LayerCapture, positions: Tensor, matches: Matches) -> dict[str, Tensor]:
        """`loss`, the mean over layers; and `corr`, `depth`, `pck` [L] without gradient.

        `positions` [N] are the visual tokens over which `matches` are defined, as flat indices into `B * S`. PCK is the
        share of matches whose arg-max is within two patches; NaN if the matches have no `token_xy`.
        """
        # A tensor on the device in both cases: a number would be copied there again for every layer.
        if self.log_temperature is None:
            temperature = torch.tensor(self.config.temperature, device=positions.device)
        else:
            temperature = self.log_temperature.exp()[0].to(positions.device)
        terms = [
            layer(capture.hidden(int(name)), positions, matches, temperature, self.config)
            for name, layer in self.by_layer.items()
        ]
        loss, corr, depth, pck = (torch.stack(term) for term in zip(*terms, strict=True))  # [L] each
        return {"loss": loss.mean(), "corr": corr.detach(), "depth": depth.detach(), "pck": pck.detach()}


class SupervisedLayer(nn.Module):
    """A head and the loss of its embeddings.

    Must be declared a leaf module to ZeRO-3 (`deepspeed.utils.set_z3_leaf_modules`). ZeRO-3 gathers and frees weights
    module by module, but `_LayerLoss` differentiates the head's weights outside the head's own forward. A leaf's
    weights stay gathered for its whole forward pass.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(
        self, hidden: Tensor, positions: Tensor, matches: Matches, temperature: Tensor, config: LossConfig
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The layer's loss, and its corr, depth and PCK without gradient; all scalars."""
        if not torch.is_grad_enabled():
            rows = hidden.flatten(0, 1).index_select(0, positions)  # [N, hidden]
            return _loss_of_rows(self.head, rows, matches, temperature, config)
        return _LayerLoss.apply(self.head, positions, matches, config, hidden, temperature, *self.head.parameters())


def _loss_of_rows(
    head: nn.Module, rows: Tensor, matches: Matches, temperature: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, corr, depth and PCK of hidden rows [N, hidden]."""
    out = gasp_loss(
        head(rows),
        matches,
        temperature=temperature,
        negatives=config.negatives,
        other_targets=config.other_targets,
        corr_weight=config.corr_weight,
        depth_weight=config.depth_weight,
        eps=config.eps,
        return_metrics=True,
        backend=config.backend,
        workspace=config.workspace,
    )
    assert out.metrics is not None
    corr, depth = out.corr_per_layer[0], out.depth_per_layer[0]
    pck = torch.full_like(corr, torch.nan) if out.metrics.pck is None else out.metrics.pck[0]
    return out.loss, corr, depth, pck


class _LayerLoss(torch.autograd.Function):
    """`_loss_of_rows` on the rows `positions` of `hidden`, with its gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        positions: Tensor,
        matches: Matches,
        config: LossConfig,
        hidden: Tensor,
        temperature: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        needs_grad = ctx.needs_input_grad[4:]  # of hidden, temperature and weights
        with torch.enable_grad():
            rows = hidden.detach().flatten(0, 1).index_select(0, positions)  # [N, hidden]
            rows.requires_grad_(needs_grad[0])
            # Detached: the temperature has a graph of its own behind it, which must not be differentiated here.
            temperature = temperature.detach().requires_grad_(needs_grad[1])
            loss, *metrics = _loss_of_rows(head, rows, matches, temperature, config)
            inputs = [x for x, needed in zip((rows, temperature, *weights), needs_grad, strict=True) if needed]
            # Without matches the loss may not depend on the temperature: its gradient is then zero.
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        ctx.save_for_backward(positions, *gradients)
        ctx.hidden_shape, ctx.hidden_dtype = hidden.shape, hidden.dtype
        metrics = [metric.detach() for metric in metrics]
        ctx.mark_non_differentiable(*metrics)
        return loss.detach(), *metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        positions, *gradients = ctx.saved_tensors
        saved = iter(gradients)
        grads = [next(saved) * upstream if needed else None for needed in ctx.needs_input_grad[4:]]
        if grads[0] is not None:
            grad_hidden = grads[0].new_zeros(ctx.hidden_shape, dtype=ctx.hidden_dtype)  # [B, S, hidden]
            grad_hidden.flatten(0, 1).index_copy_(0, positions, grads[0].to(ctx.hidden_dtype))
            grads[0] = grad_hidden
        return None, None, None, None, *grads

"""`GaspLoss`: `gasp_loss` as a module, with a temperature that can be trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .arguments import check_number, check_temperature
from .config import LossConfig
from .function import GaspOutput, gasp_loss
from .matches import Matches
from .metric import InMetric


class GaspLoss(nn.Module):
    """`gasp_loss` as a module. With `learnable_temperature` the temperature is trained, as its logarithm."""

    layer_weights: Tensor | None

    def __init__(
        self,
        temperature: float = LossConfig.temperature,
        negatives: str = "sequence",
        corr_weight: float = LossConfig.corr_weight,
        depth_weight: float = LossConfig.depth_weight,
        eps: float = LossConfig.eps,
        layer_weights: Tensor | None = None,
        reduction: str = "mean",
        return_metrics: bool = False,
        backend: str = "auto",
        learnable_temperature: bool = False,
        *,
        other_targets: str = "negatives",
        workspace: int | None = None,
    ) -> None:
        super().__init__()
        check_number("temperature", temperature, positive=True)
        check_temperature(temperature)
        self.temperature = temperature
        self.negatives, self.reduction, self.backend = negatives, reduction, backend
        self.corr_weight, self.depth_weight, self.eps = corr_weight, depth_weight, eps
        self.return_metrics, self.other_targets, self.workspace = return_metrics, other_targets, workspace
        # [1], not []: DeepSpeed communicates parameters as bytes, which torch refuses for 0-dim tensors.
        self.log_temperature = nn.Parameter(torch.tensor([float(temperature)]).log()) if learnable_temperature else None
        self.register_buffer("layer_weights", layer_weights, persistent=False)

    def forward(
        self,
        embeddings: Tensor | Sequence[Tensor] | InMetric,
        matches: Matches,
        keys: Tensor | Sequence[Tensor] | None = None,
    ) -> GaspOutput:
        return gasp_loss(
            embeddings,
            matches,
            temperature=self.temperature if self.log_temperature is None else self.log_temperature.exp()[0],
            negatives=self.negatives,
            corr_weight=self.corr_weight,
            depth_weight=self.depth_weight,
            eps=self.eps,
            layer_weights=self.layer_weights,
            reduction=self.reduction,
            return_metrics=self.return_metrics,
            backend=self.backend,
            keys=keys,
            other_targets=self.other_targets,
            workspace=self.workspace,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, negatives={self.negatives!r}, corr_weight={self.corr_weight}, "
            f"depth_weight={self.depth_weight}, reduction={self.reduction!r}, backend={self.backend!r}"
        )

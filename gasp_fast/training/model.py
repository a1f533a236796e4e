"""The model that is trained: a vision-language model, with or without adapters, and the supervision of its layers.

The whole loss is computed inside one `forward`, so that DDP and DeepSpeed see all of it.

Precision: trained weights (adapters, heads, or all) are stored in fp32, frozen ones in the model's `dtype`. Products
run in `dtype` under autocast, except in heads and loss, which have their own settings. DeepSpeed's own mixed precision
stays off: it would round the heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gasp_fast.backbones import Backbone
from gasp_fast.backbones.adapters import add_adapters
from gasp_fast.backbones.base_model import DTYPES, load_base_model, use_checkpointing
from gasp_fast.loss.matches import Matches
from gasp_fast.supervision.heads import CorrespondenceHead, CorrespondenceHeads, HeadsConfig, parse_layers
from gasp_fast.supervision.layer_capture import LayerCapture
from gasp_fast.supervision.streamed import GeometricSupervision

from .config import TrainConfig
from .modality import backbone_states, language_loss


class SupervisedModel(nn.Module):
    """A forward pass of training: the language loss and the geometric losses of the supervised layers."""

    def __init__(
        self,
        backbone: Backbone,
        model: nn.Module,
        supervision: GeometricSupervision | None,
        lm_weight: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.backbone, self.model, self.supervision = backbone, model, supervision
        self.lm_weight, self.dtype = lm_weight, dtype

    def forward(self, visual_positions: Tensor, matches: Matches, labels: Tensor, **inputs: Tensor) -> dict[str, Any]:
        """The `loss` and, without gradient, its terms: `lm`; with heads also `corr`, `depth` and `pck`, [L] each.

        `answers` is the number of labelled tokens.
        """
        device = labels.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            if self.supervision is None:
                lm, answers = language_loss(self.model, backbone_states(self.model, inputs), labels)
                return {"loss": self.lm_weight * lm, "lm": lm.detach(), "answers": answers}
            layers: Any = self.backbone.decoder_layers(self.model)
            with LayerCapture(layers, self.backbone.final_norm(self.model), self.supervision.layers) as capture:
                states = backbone_states(self.model, inputs)
            lm, answers = language_loss(self.model, states, labels)
            geometry = self.supervision(capture, visual_positions, matches)
        return {
            "loss": self.lm_weight * lm + geometry["loss"],
            "lm": lm.detach(),
            "answers": answers,
            "corr": geometry["corr"],
            "depth": geometry["depth"],
            "pck": geometry["pck"],
        }


# ---- building it ----------------------------------------------------------------------------------------------------


def build_model(config: TrainConfig, device: torch.device) -> SupervisedModel:
    """The model of a run, on the CPU, the same on every process. `device` computes the SVD of the heads."""
    torch.manual_seed(config.train.seed)
    backbone, model = load_base_model(config.model, device, stored_dtype(config))
    return supervise(config, backbone, model, device)


def stored_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype of the base model's weights: fp32 if they are trained."""
    return DTYPES[config.model.dtype] if config.train.mode == "lora" else torch.float32


def supervise(config: TrainConfig, backbone: Backbone, model: nn.Module, device: torch.device) -> SupervisedModel:
    """Add the heads, adapters and checkpointing of `config` to a base model."""
    heads = build_heads(config.heads, backbone, model, device) if config.loss.geometric else None
    if config.train.mode == "lora":
        model = add_adapters(backbone, model, config.lora)
    else:
        model.requires_grad_(True)
    use_checkpointing(model, config.train.checkpointing)
    supervision = None if heads is None else GeometricSupervision(heads, config.loss, config.loss.learnable_temperature)
    return SupervisedModel(backbone, model, supervision, config.loss.lm_weight, DTYPES[config.model.dtype])


def build_heads(config: HeadsConfig, backbone: Backbone, model: nn.Module, device: torch.device) -> CorrespondenceHeads:
    """Heads of the chosen layers. Call it before the model is sharded, while every process has all of W_Q."""
    layers = parse_layers(config.layers, backbone.layer_count)
    if config.init == "random":
        size = backbone.hidden_size
        return CorrespondenceHeads(
            {layer: CorrespondenceHead(size, config.mid_size, config.out_size, config.compute) for layer in layers}
        )
    heads = {}
    for layer in layers:
        weight, bias = backbone.query_projection(model, layer)
        head = CorrespondenceHead.from_query_projection(
            weight.detach().to(device), None if bias is None else bias.to(device), config.mid_size, config.out_size,
            config.compute,
        )  # fmt: skip
        heads[layer] = head.cpu()
    return CorrespondenceHeads(heads)

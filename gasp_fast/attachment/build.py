"""Builds the heads of a model's decoder layers, and their supervision."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from gasp_fast.backbones import Backbone
from gasp_fast.backbones.base_model import DTYPES
from gasp_fast.loss.config import LossConfig
from gasp_fast.supervision.geometric import GeometricSupervision, LayerReduction
from gasp_fast.supervision.heads import CorrespondenceHead, CorrespondenceHeads, HeadsConfig, parse_layers
from gasp_fast.supervision.live_projections import LiveProjections

ModelDtype = Literal["fp32", "bf16"]  # in which the model computes


def build_heads(
    config: HeadsConfig, backbone: Backbone, model: nn.Module, device: torch.device, dtype: ModelDtype = "fp32"
) -> CorrespondenceHeads:
    """Heads of the chosen layers, on the CPU, the same on every process. `device` decomposes W_Q.

    Call it before the model is sharded, while every process has all of W_Q, and with the same state of the random
    generator everywhere. Only the first process decomposes, one layer at a time, and sends the head to the others.
    """
    heads, (compute, _) = {}, config.precisions(dtype)
    for layer in parse_layers(config.layers, backbone.layer_count):
        if config.init == "random":
            heads[layer] = CorrespondenceHead(backbone.hidden_size, config.mid_size, config.out_size, compute)
            continue
        weight, bias = backbone.query_projection(model, layer)
        bias = bias if config.bias == "copy" else None
        weight, bias = weight.detach().to(device), None if bias is None else bias.detach().to(device)
        head = CorrespondenceHead.sized_for(weight, bias, config.mid_size, config.out_size, compute)
        if not dist.is_initialized() or dist.get_rank() == 0:
            head.approximate(weight, bias)
        if dist.is_initialized():
            for parameter in head.parameters():
                dist.broadcast(parameter.detach(), src=0)
        heads[layer] = head.cpu()
    return CorrespondenceHeads(heads, config.input)


def build_supervision(
    config: HeadsConfig,
    loss: LossConfig,
    backbone: Backbone,
    model: nn.Module,
    heads: CorrespondenceHeads | None,
    dtype: ModelDtype,
    *,
    learnable_temperature: bool = False,
    layer_reduction: LayerReduction = "mean",
) -> GeometricSupervision:
    """The supervision of a model, by correspondence heads, by its own projections, or by both."""
    embeddings, live = DTYPES[config.precisions(dtype)[1]], config.live
    projections = []
    if live is not None:
        head_dim = backbone.attention_shape.head_dim
        for layer in parse_layers(config.layers, backbone.layer_count):
            attention = backbone.attention(model, layer)
            projections.append(LiveProjections(layer, attention, head_dim, live, config.attention_heads, embeddings))
    return GeometricSupervision(
        heads, loss, learnable_temperature, embeddings, layer_reduction=layer_reduction, live=projections
    )

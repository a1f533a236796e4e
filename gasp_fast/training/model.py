"""The model that is trained: a vision-language model, with or without adapters, and the supervision of its layers.

The whole loss is computed inside one `forward`, so that DDP and DeepSpeed see all of it.

Every process runs the same modules in the same order at every step, whatever its batch holds. ZeRO-3 gathers the
weights of each module from all processes when it runs; ZeRO-1/2 and DDP reduce gradients in the order in which they
appear. If a process skipped a module, because its batch has no picture, no answer or no track, the others would wait
for it for ever. So no module is ever skipped:

    vision tower   a batch without frames gets one more conversation, about a blank frame (`SteadyCollator`)
    lm head        runs on the hidden states of labelled tokens, even of none: an empty product has zero gradients
    heads, loss    run on the rows of tracked tokens, even of none

Terms that a batch lacks are exactly zero, with zero gradients, and cost almost nothing. As a side effect, logits are
only computed where there is a label: for 16 frames of 576 tokens each that is a few megabytes instead of several
gigabytes.

Precision: trained weights (adapters, heads, or all) are stored in fp32, frozen ones in the model's `dtype`. Products
run in `dtype` under autocast, except in heads and loss, which have their own settings. DeepSpeed's own mixed precision
stays off: it would round the heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gasp_fast.backbones import Backbone, unwrap
from gasp_fast.backbones.adapters import add_adapters
from gasp_fast.backbones.base_model import DTYPES, load_base_model, use_checkpointing
from gasp_fast.backbones.chat import IGNORE
from gasp_fast.loss.matches import Matches
from gasp_fast.supervision.geometric import GeometricSupervision
from gasp_fast.supervision.heads import CorrespondenceHead, CorrespondenceHeads, HeadsConfig, parse_layers
from gasp_fast.supervision.layer_capture import LayerCapture

from .config import TrainConfig


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
        layers: Any = self.backbone.decoder_layers(self.model)
        supervised = [] if self.supervision is None else self.supervision.layers
        with torch.autocast(labels.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            with LayerCapture(layers, self.backbone.final_norm(self.model), supervised) as capture:
                states = unwrap(self.model).base_model(**inputs, use_cache=False)[0]  # [B, S, D], after the final norm
            lm, answers = language_loss(self.model, states, labels)
            terms = {"loss": self.lm_weight * lm, "lm": lm.detach(), "answers": answers}
            if self.supervision is None:
                return terms
            geometry = self.supervision(capture, visual_positions, matches)
        return {**terms, **geometry, "loss": terms["loss"] + geometry["loss"]}


def language_loss(model: nn.Module, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of the labelled tokens (0 without any), and their number.

    `hidden` [B, S, D] are the model's last states after the final norm; `labels` [B, S] are IGNORE where a token has
    none. Token t is predicted from state t - 1.
    """
    following = labels[:, 1:]
    labelled = following != IGNORE  # [B, S - 1]
    # Indexing with a mask makes the host wait for a GPU to count its rows: the one wait of a forward pass.
    rows = hidden[:, :-1][labelled]  # [K, D]
    logits = unwrap(model).get_output_embeddings()(rows).float()  # [K, V]
    count = labelled.sum()
    return F.cross_entropy(logits, following[labelled], reduction="sum") / count.clamp(min=1), count


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
    projections = {}
    for layer in layers:
        weight, bias = backbone.query_projection(model, layer)
        projections[layer] = (weight.to(device), None if bias is None else bias.to(device))
    return CorrespondenceHeads.from_query_projections(
        projections, config.mid_size, config.out_size, config.compute
    ).cpu()

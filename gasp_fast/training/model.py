"""The model that is trained: a vision-language model, with or without adapters, and the supervision of its layers.

In `train.mode: heads` the vision-language model is frozen: no gradient flows through it, and it keeps no activations.

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

import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gasp_fast.backbones import Backbone, TokenIndex, unwrap
from gasp_fast.backbones.adapters import add_adapters
from gasp_fast.backbones.base_model import DTYPES, load_base_model, use_checkpointing
from gasp_fast.backbones.unmasked_attention import use_unmasked_attention
from gasp_fast.loss.matches import Matches
from gasp_fast.planning.shapes import shape_from_model
from gasp_fast.supervision.geometric import GeometricSupervision
from gasp_fast.supervision.heads import CorrespondenceHead, CorrespondenceHeads, HeadsConfig, parse_layers
from gasp_fast.supervision.layer_capture import LayerCapture
from gasp_fast.supervision.live_projections import LiveProjections
from gasp_fast.supervision.precision import Compute

from .config import TrainConfig
from .workload import setup_here


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
        self.head_seconds = 0.0  # that it took to build the heads

    def forward(
        self,
        visual_positions: Tensor,
        matches: Matches,
        labels: Tensor,
        token_index: TokenIndex | None = None,  # None: computed here, for which the host waits for a GPU
        counts: Tensor | None = None,  # [3], what the means of the batch are over; not used here
        shares: Tensor | None = None,  # float32 [3], of the batch in the step's labelled tokens, corr and depth terms
        **inputs: Tensor,
    ) -> dict[str, Any]:
        """The `loss` and, without gradient, its terms: `lm`; with heads `corr`, `depth`, `pck`, `cosine` [L].

        With `shares`, these are the batch's parts of the means of an optimiser step, which add up to them
        (`objective.py`); otherwise the means of the batch. `answers` is the number of labelled tokens.
        """
        if token_index is None:
            token_index = self.backbone.index_tokens({**inputs, "labels": labels})
        layers: Any = self.backbone.decoder_layers(self.model)
        norm = self.backbone.final_norm(self.model)
        reading = LayerCapture(layers, norm, []) if self.supervision is None else self.supervision.capture(layers, norm)
        with torch.autocast(labels.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            with reading as capture:
                states = self.backbone.last_states(self.model, inputs, token_index)  # [B, S, D]
            lm = language_loss(self.model, states, token_index)
            if shares is not None:
                lm = lm * shares[0]
                matches = matches.with_shares(
                    corr=matches.index.corr_share * shares[1], depth=matches.index.depth_share * shares[2]
                )
            terms = {"loss": self.lm_weight * lm, "lm": lm.detach(), "answers": len(token_index.answers)}
            if self.supervision is None:
                return terms
            geometry = self.supervision(capture, visual_positions, matches)
        return {**terms, **geometry, "loss": terms["loss"] + geometry["loss"]}


def language_loss(model: nn.Module, hidden: Tensor, index: TokenIndex) -> Tensor:
    """Mean cross entropy of the labelled tokens; 0 without any.

    `hidden` [B, S, D] are the model's last states after the final norm. A token is predicted from the one before it.
    """
    rows = hidden.flatten(0, 1).index_select(0, index.predicting)  # [K, D]
    logits = unwrap(model).get_output_embeddings()(rows).float()  # [K, V]
    return F.cross_entropy(logits, index.answers, reduction="sum") / max(1, len(index.answers))


# ---- building it ----------------------------------------------------------------------------------------------------


def build_model(config: TrainConfig, device: torch.device) -> SupervisedModel:
    """The model of a run, on the CPU, the same on every process. `device` decomposes W_Q for the heads."""
    torch.manual_seed(config.train.seed)
    backbone, model = load_base_model(config.model, device, stored_dtype(config))
    return supervise(config, backbone, model, device)


def stored_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype of the base model's weights: fp32 if they are trained."""
    return torch.float32 if config.train.mode == "full" else DTYPES[config.model.dtype]


def supervise(config: TrainConfig, backbone: Backbone, model: nn.Module, device: torch.device) -> SupervisedModel:
    """Add the heads, adapters and checkpointing of `config` to a base model."""
    start = time.perf_counter()
    heads = None
    if config.loss.geometric and config.heads.own:  # before the adapters: from the model's own query projections
        heads = build_heads(config.heads, backbone, model, device, config.heads.precisions(config.model.dtype)[0])
    head_seconds = time.perf_counter() - start
    use_unmasked_attention(model)
    if config.train.mode == "lora":
        model = add_adapters(backbone, model, config.lora)
    else:
        model.requires_grad_(config.train.mode == "full")
    supervision = supervision_of(config, backbone, model, heads) if config.loss.geometric else None
    setup = setup_here(config, shape_from_model(unwrap(model)), backbone, device)
    layers = backbone.decoder_layers(model)
    kept = [layers[number] for number in config.train.kept_layers(len(layers), setup.kept_layers)]
    use_checkpointing(model, config.train.checkpointing if setup.checkpointing else "off", kept)
    supervised = SupervisedModel(backbone, model, supervision, config.loss.lm_weight, DTYPES[config.model.dtype])
    supervised.head_seconds = head_seconds
    return supervised


def supervision_of(
    config: TrainConfig, backbone: Backbone, model: nn.Module, heads: CorrespondenceHeads | None
) -> GeometricSupervision:
    """The supervision of a model, by correspondence heads, by its own projections, or by both."""
    embeddings, live, loss = DTYPES[config.heads.precisions(config.model.dtype)[1]], config.heads.live, config.loss
    projections = []
    if live is not None:
        head_dim = backbone.attention_shape.head_dim
        for layer in parse_layers(config.heads.layers, backbone.layer_count):
            attention = backbone.attention(model, layer)
            projections.append(
                LiveProjections(layer, attention, head_dim, live, config.heads.attention_heads, embeddings)
            )
    return GeometricSupervision(
        heads,
        loss,
        loss.learnable_temperature,
        embeddings,
        layer_reduction=loss.layer_reduction,
        live=projections,
    )


def build_heads(
    config: HeadsConfig, backbone: Backbone, model: nn.Module, device: torch.device, compute: Compute = "fp32"
) -> CorrespondenceHeads:
    """Heads of the chosen layers, on the CPU, the same on every process. `device` decomposes W_Q.

    Call it before the model is sharded, while every process has all of W_Q, and with the same state of the random
    generator everywhere. Only the first process decomposes, one layer at a time, and sends the head to the others.
    """
    heads = {}
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

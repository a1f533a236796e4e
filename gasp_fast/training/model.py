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
import torch.nn.functional as F
from torch import Tensor, nn

from gasp_fast.attachment.build import build_heads, build_supervision
from gasp_fast.backbones import Backbone, TokenIndex, unwrap
from gasp_fast.backbones.adapters import add_adapters
from gasp_fast.backbones.base_model import DTYPES, load_base_model, use_checkpointing
from gasp_fast.backbones.unmasked_attention import use_unmasked_attention
from gasp_fast.loss.matches import Matches
from gasp_fast.planning.shapes import shape_from_model
from gasp_fast.supervision.geometric import GeometricSupervision
from gasp_fast.supervision.layer_capture import LayerCapture

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
        (`averages.py`); otherwise the means of the batch. `answers` is the number of labelled tokens.
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
        heads = build_heads(config.heads, backbone, model, device, config.model.dtype)
    head_seconds = time.perf_counter() - start
    use_unmasked_attention(model)
    if config.train.mode == "lora":
        model = add_adapters(backbone, model, config.lora)
    else:
        model.requires_grad_(config.train.mode == "full")
    supervision = None
    if config.loss.geometric:
        supervision = build_supervision(
            config.heads,
            config.loss,
            backbone,
            model,
            heads,
            config.model.dtype,
            learnable_temperature=config.loss.learnable_temperature,
            layer_reduction=config.loss.layer_reduction,
        )
    setup = setup_here(config, shape_from_model(unwrap(model)), backbone, device)
    layers = backbone.decoder_layers(model)
    kept = [layers[number] for number in config.train.kept_layers(len(layers), setup.kept_layers)]
    use_checkpointing(model, config.train.checkpointing if setup.checkpointing else "off", kept)
    supervised = SupervisedModel(backbone, model, supervision, config.loss.lm_weight, DTYPES[config.model.dtype])
    supervised.head_seconds = head_seconds
    return supervised

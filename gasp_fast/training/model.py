"""The model that is trained: a vision-language model, adapters or not, and the supervision of its layers.

Knows how the parts are put together and what a step computes; must not know where batches come from, nor how weights
are updated. Everything happens inside one `forward`, so that DDP and DeepSpeed see the whole step.

Precision: whatever is trained (adapters, heads, or all) is stored in fp32, whatever is frozen in the model's `dtype`;
products run in `dtype` under autocast, except in heads and loss, which choose for themselves. DeepSpeed is therefore
never told about bf16: its own mixed precision would round the heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gasp_fast.backbones import Backbone, load_backbone
from gasp_fast.backbones.adapters import add_adapters
from gasp_fast.backbones.base_model import DTYPES, choose_attention, use_checkpointing, use_liger
from gasp_fast.loss.matches import Matches
from gasp_fast.supervision.heads import CorrespondenceHead, CorrespondenceHeads, HeadsConfig, parse_layers
from gasp_fast.supervision.layer_capture import LayerCapture
from gasp_fast.supervision.streamed import GeometricSupervision

from .config import TrainConfig
from .modality import backbone_states, language_loss


class SupervisedModel(nn.Module):
    """One step's forward: language loss, and the geometric losses of the supervised layers."""

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
        """The `loss`, and what it is made of, without gradient; per layer [L] where there are heads."""
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


@dataclass(frozen=True)
class Group:
    """Parameters that are trained alike."""

    name: str  # "adapters" | "model" | "heads"
    parameters: list[tuple[str, nn.Parameter]]

    @property
    def count(self) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) for _, p in self.parameters)  # ZeRO-3 leaves p itself empty


def trained_groups(model: SupervisedModel) -> Iterator[Group]:
    """What is trained, by kind; empty kinds are left out."""
    kinds: dict[str, list[tuple[str, nn.Parameter]]] = {"adapters": [], "model": [], "heads": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "heads" if name.startswith("supervision.") else "adapters" if "lora_" in name else "model"
            kinds[kind].append((name, parameter))
    return (Group(name, found) for name, found in kinds.items() if found)


# ---- putting it together --------------------------------------------------------------------------------------------


def build_model(config: TrainConfig, device: torch.device) -> SupervisedModel:
    """The model of a run, on the CPU, the same on every process. `device` is only borrowed for the heads' SVD."""
    torch.manual_seed(config.train.seed)
    backbone = load_backbone(config.model.source, config.model.frame_pixels)
    model = backbone.load_model(dtype=stored_dtype(config), attention=choose_attention(config.model, device))
    return supervise(config, backbone, model, device)


def stored_dtype(config: TrainConfig) -> torch.dtype:
    """Of the base model: what is trained is fp32."""
    return DTYPES[config.model.dtype] if config.train.mode == "lora" else torch.float32


def supervise(config: TrainConfig, backbone: Backbone, model: nn.Module, device: torch.device) -> SupervisedModel:
    """A base model, wherever its weights came from, with heads, adapters and whatever else `config` asks for."""
    backbone.quicken(model)
    if config.model.liger:
        use_liger(model)
    heads = build_heads(config.heads, backbone, model, device) if config.loss.geometric else None
    if config.train.mode == "lora":
        model = add_adapters(backbone, model, config.lora)
    else:
        model.requires_grad_(True)
    use_checkpointing(model, config.train.checkpointing)
    supervision = None if heads is None else GeometricSupervision(heads, config.loss, config.loss.learnable_temperature)
    return SupervisedModel(backbone, model, supervision, config.loss.lm_weight, DTYPES[config.model.dtype])


def build_heads(config: HeadsConfig, backbone: Backbone, model: nn.Module, device: torch.device) -> CorrespondenceHeads:
    """Heads of the chosen layers. They are made before the model is sharded, so W_Q is whole on every process."""
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

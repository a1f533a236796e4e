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

from gasp_fast.backbones import Backbone, load_backbone, unwrap
from gasp_fast.loss.matches import Matches
from gasp_fast.supervision.heads import CorrespondenceHead, CorrespondenceHeads, parse_layers
from gasp_fast.supervision.layer_capture import LayerCapture
from gasp_fast.supervision.streamed import GeometricLoss, GeometricSupervision

from .config import HeadsConfig, LoraSettings, LossConfig, ModelConfig, TrainConfig
from .modality import backbone_states, language_loss

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
        _use_liger(model)
    heads = build_heads(config.heads, backbone, model, device) if config.loss.geometric else None
    if config.train.mode == "lora":
        model = add_adapters(backbone, model, config.lora)
    else:
        model.requires_grad_(True)
    _use_checkpointing(model, config.train.checkpointing)
    supervision = None if heads is None else GeometricSupervision(heads, geometric_loss(config.loss))
    return SupervisedModel(backbone, model, supervision, config.loss.lm_weight, DTYPES[config.model.dtype])


def geometric_loss(config: LossConfig) -> GeometricLoss:
    return GeometricLoss(
        temperature=config.temperature,
        learnable_temperature=config.learnable_temperature,
        negatives=config.negatives,
        corr_weight=config.corr_weight,
        depth_weight=config.depth_weight,
        backend=config.backend,
    )


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


def add_adapters(backbone: Backbone, model: nn.Module, config: LoraSettings) -> nn.Module:
    """LoRA on q, k, v, o of the language model; everything else frozen. The adapters are fp32, as peft makes them."""
    from peft import LoraConfig, get_peft_model

    wanted = LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        target_modules=backbone.lora_targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, wanted)


def choose_attention(config: ModelConfig, device: torch.device) -> str:
    """The attention of the model: the fastest that is there, or the one asked for, if it is there."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    there = {"flash_attention_3": is_flash_attn_3_available(), "flash_attention_2": is_flash_attn_2_available()}
    usable = device.type == "cuda" and config.dtype == "bf16"
    if config.attention == "auto":
        return next((name for name, found in there.items() if found and usable), "sdpa")
    if config.attention in there and not (there[config.attention] and usable):
        reason = "is not installed" if usable else f"needs a GPU and bf16, and this is {device.type}, {config.dtype}"
        raise ValueError(f"model.attention = {config.attention!r} {reason}; use model.attention=auto")
    return config.attention


def _use_liger(model: Any) -> None:
    """Fused norms, rotary embeddings and MLPs. The loss stays ours: it only ever sees labelled tokens."""
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        raise ValueError("model.liger = true, but liger-kernel is not installed; pip install liger-kernel") from None
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"model.liger = true, but liger-kernel has nothing for {model.config.model_type}; use model.liger=false"
        )
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def _use_checkpointing(model: Any, kind: str) -> None:
    if kind == "off":
        return
    reentrant = kind == "reentrant"
    inner = unwrap(model)
    if hasattr(inner, "activation_checkpointing_enable"):  # its name since transformers 5.20
        inner.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        # Reentrant checkpointing gives no gradient to a block whose input needs none, whatever is trained inside it.
        embeddings = inner.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))

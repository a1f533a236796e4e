"""Trained weights on disk: adapters or the whole model as Hugging Face stores them, and `heads.safetensors`."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gasp_fast.backbones.adapters import read_adapters
from gasp_fast.backbones.saved_model import load_complete
from gasp_fast.run_folder import HEADS
from gasp_fast.supervision.head_files import write_heads

from .checkpoints import readable
from .model import SupervisedModel


def gathered(parameter: nn.Parameter) -> Tensor:
    """The full value of a parameter. ZeRO-3 keeps a part on each process, so all processes must call."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


@dataclass(frozen=True)
class TrainedWeights:
    """The trained weights by the names that they have in files; empty on all processes but the first."""

    model: dict[str, Tensor]  # adapters, or all weights; empty where only heads are trained
    heads: dict[str, Tensor]


def gather_weights(model: SupervisedModel, first: bool) -> TrainedWeights:
    """Copy the trained weights one by one into the CPU memory of the first process. All processes must call."""
    weights = TrainedWeights({}, {})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = gathered(parameter)
            if first and name.startswith("supervision."):
                weights.heads[name.removeprefix("supervision.").replace(".head.", ".")] = value.to("cpu", copy=True)
            elif first:
                weights.model[name.removeprefix("model.")] = value.to("cpu", copy=True)
    return weights


def write_weights(model: SupervisedModel, folder: Path, weights: TrainedWeights) -> None:
    inner: Any = model.model
    if hasattr(inner, "peft_config"):
        inner.save_pretrained(folder, state_dict=weights.model, save_embedding_layers=False)
    elif weights.model:
        inner.save_pretrained(folder, state_dict=weights.model)
        model.backbone.processor.save_pretrained(folder)
    if weights.heads:
        supervision: Any = model.supervision
        compute = next(iter(supervision.heads.by_layer.values())).first.compute
        write_heads(folder / HEADS, weights.heads, compute, supervision.reads)


def read_weights(model: SupervisedModel, folder: Path) -> None:
    """Load the trained weights of a checkpoint into a model that is not sharded."""
    inner: Any = model.model
    if hasattr(inner, "peft_config"):
        read_adapters(inner, folder)
    elif any(parameter.requires_grad for parameter in inner.parameters()):
        # The configuration is the run's: without config.json, transformers would build a model of default size.
        stored = load_complete(type(inner), folder, unused=False, dtype=torch.float32, config=deepcopy(inner.config))
        inner.load_state_dict(stored.state_dict())
    if model.supervision is not None and model.supervision.heads is not None:
        with readable(path := folder / HEADS):
            named = {re.sub(r"^(by_layer\.\d+)\.", r"\1.head.", name): value for name, value in load_file(path).items()}
            model.supervision.load_state_dict(named)

"""Trained weights on disk: adapters or the whole model as Hugging Face stores them, and `heads.safetensors`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gasp_fast.backbones.adapters import read_adapters
from gasp_fast.run_folder import HEADS
from gasp_fast.supervision.head_files import write_heads

from .checkpoints import readable
from .distributed import Processes
from .divided_files import Dealt, deal, read_into
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
    """The trained weights by the names that they have in files."""

    adapters: dict[str, Tensor]  # of train.mode lora; these and the heads are empty on all processes but the first
    heads: dict[str, Tensor]
    whole: Dealt | None  # all weights of train.mode full, of which each process has a share


def gather_weights(model: SupervisedModel, processes: Processes, in_place: bool = False) -> TrainedWeights:
    """Copy the trained weights one by one to host memory, where they are written from. All processes must call.

    `in_place` leaves those of full training where they are, if they are not divided.
    """
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    adapters, heads = dict[str, Tensor](), dict[str, Tensor]()
    names = names_in_files(model.model) if is_fully_trained(model) else {}
    whole = ((names[name], gathered(trained[f"model.{name}"])) for name in names)
    dealt = deal(whole, processes.rank, processes.world_size, in_place) if names else None
    whole_names = {f"model.{name}" for name in names}
    for name, parameter in trained.items():  # in the same order on all processes
        if name in whole_names:
            continue
        value = gathered(parameter)
        if processes.first and name.startswith("supervision."):
            heads[name.removeprefix("supervision.").replace(".head.", ".")] = value.to("cpu", copy=True)
        elif processes.first:
            adapters[name.removeprefix("model.")] = value.to("cpu", copy=True)
    return TrainedWeights(adapters, heads, dealt)


def is_fully_trained(model: SupervisedModel) -> bool:
    inner: Any = model.model
    return not hasattr(inner, "peft_config") and any(parameter.requires_grad for parameter in inner.parameters())


def names_in_files(model: Any) -> dict[str, str]:
    """The trained weights of a transformers model: name in memory -> name that transformers gives it in files.

    One that transformers would also divide or join for its files keeps its name.
    """
    from transformers.core_model_loading import revert_weight_conversion

    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    empty = {name: torch.empty_like(value, device="meta") for name, value in trained.items()}
    names = {id(tensor): name for name, tensor in revert_weight_conversion(model, empty).items()}
    return {name: names.get(id(tensor), name) for name, tensor in empty.items()}


def write_weights(model: SupervisedModel, folder: Path, weights: TrainedWeights) -> None:
    """What the first process writes: all but its share of a fully trained model."""
    inner: Any = model.model
    if hasattr(inner, "peft_config"):
        inner.save_pretrained(folder, state_dict=weights.adapters, save_embedding_layers=False)
    elif weights.whole is not None:
        inner.config.save_pretrained(folder)
        inner.generation_config.save_pretrained(folder)
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
    elif is_fully_trained(model):
        with readable(folder):
            named = dict(inner.named_parameters())
            read_into({other: named[name].detach() for name, other in names_in_files(inner).items()}, folder, "model")
    if model.supervision is not None and model.supervision.heads is not None:
        with readable(path := folder / HEADS):
            named = {re.sub(r"^(by_layer\.\d+)\.", r"\1.head.", name): value for name, value in load_file(path).items()}
            model.supervision.load_state_dict(named)

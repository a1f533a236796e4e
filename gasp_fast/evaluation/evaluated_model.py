"""Loads the model under evaluation, with its correspondence heads if it has them.

Accepts the folder of a saved model, a hub name, a folder with a LoRA adapter (merged into its base model), or a
training run (its last checkpoint).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gasp_fast.backbones import Backbone, Conversation, load_backbone
from gasp_fast.backbones.adapters import load_adapters
from gasp_fast.backbones.base_model import usable_device
from gasp_fast.backbones.fingerprint import check_base
from gasp_fast.backbones.frames import FramesAs
from gasp_fast.backbones.saved_model import loading, local_folder
from gasp_fast.run_folder import (
    ABOUT,
    CONFIG,
    EXPORT,
    HEADS,
    LOG,
    base_of,
    check_intact,
    configuration_of,
    holds_only_heads,
    model_name,
    weights_fingerprint,
    weights_folder,
)
from gasp_fast.supervision.head_files import read_heads
from gasp_fast.supervision.heads import CorrespondenceHeads, parse_layers


@dataclass(frozen=True)
class EvaluatedModel:
    """A model in evaluation mode, on its device, without gradients."""

    name: str
    backbone: Backbone
    model: nn.Module
    heads: CorrespondenceHeads | None
    heads_origin: str | None  # "trained", "initial" (made from W_Q at loading), or None
    fingerprint: str  # changes with the weight files
    base: str | None = None  # of adapters, if it is not the one that their files name
    computes_on: torch.device | None = None  # None: where its weights are
    frame_pixels: int | None = None  # most pixels of a frame after resizing; None: the processor's own limit

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device if self.computes_on is None else self.computes_on


def load_evaluated_model(
    source: str | os.PathLike[str],
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    frame_pixels: int | None = None,
    frames_as: FramesAs | None = None,
    initial_heads: bool = False,
    base: str | None = None,
) -> EvaluatedModel:
    """Loads a model; `initial_heads` gives one without heads those that training would start from.

    `base` overrides the base model that a run or an adapter names. A base model that only they name is not downloaded.
    `frame_pixels` and `frames_as` are by default those of the run which the model is from.
    """
    device = usable_device(device)
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    folder = _weights_folder(Path(source))
    frames_as = frames_as or _frames_of_run(folder)
    if frame_pixels is None and folder is not None:
        frame_pixels = _frame_pixels_of(folder)
    if folder is not None and ((folder / "adapter_config.json").is_file() or holds_only_heads(folder)):
        backbone, model = _load_on_base(folder, dtype, frame_pixels, frames_as, base)
    else:
        backbone = load_backbone(source if folder is None else folder, frame_pixels, frames_as)
        model = backbone.load_model(dtype=dtype)
    if backbone.frames_per_grid > 1:
        raise ValueError(
            f"frames_as = {frames_as!r}, as in {model_name(str(source))}, merges frames into one grid of tokens, whose "
            "points cannot be scored frame by frame; give --frames-as video_doubled"
        )
    with loading(source):
        backbone.replace_slow_modules(model)
        model = model.eval().requires_grad_(False).to(device)
        _try_out(backbone, model)
    heads = None
    if folder is not None and (folder / HEADS).is_file():
        heads = read_heads(folder / HEADS)
    if folder is not None and (folder / ABOUT).is_file():  # a checkpoint
        _check_heads_complete(folder, heads, backbone.layer_count)
    origin = None if heads is None else "trained"
    if heads is None and initial_heads:
        projections = {layer: backbone.query_projection(model, layer) for layer in range(backbone.layer_count)}
        heads, origin = CorrespondenceHeads.from_query_projections(projections), "initial"
    if heads is not None:
        _check_heads_fit(heads, backbone, str(source))
        heads = heads.eval().requires_grad_(False).to(device)
    name, fingerprint = model_name(str(source)), weights_fingerprint(folder or Path(source))
    return EvaluatedModel(name, backbone, model, heads, origin, fingerprint, base, frame_pixels=frame_pixels)


def _frames_of_run(folder: Path | None) -> Any:
    """`model.frames_as` of the run that a checkpoint is of."""
    model = {} if folder is None else configuration_of(folder).get("model")
    return str(model.get("frames_as", "images")) if isinstance(model, dict) else "images"


def _weights_folder(source: Path) -> Path | None:
    """The folder with weights: `source` itself, or the last checkpoint of a run; None for a hub name."""
    if not source.is_dir():
        return None
    if (source / "config.json").is_file():  # a plain model; loading it says what is wrong with it
        check_intact(source)
        return source
    for folder in (source, source / EXPORT):
        if (weights := weights_folder(folder)) is not None:
            return weights
    raise OSError(f"model = {str(source)!r} holds no model, adapter or run; pass a saved model's folder, or a hub name")


def _frame_pixels_of(folder: Path) -> int | None:
    """`model.frame_pixels` of the run that a checkpoint, adapters or an export belong to; None elsewhere."""
    exported = folder.name == EXPORT and (folder.parent / LOG).is_file()
    if not exported and not any((folder / name).is_file() for name in (ABOUT, "adapter_config.json")):
        return None
    model = configuration_of(folder).get("model")
    pixels = model.get("frame_pixels") if isinstance(model, dict) else None
    if pixels is not None and (type(pixels) is not int or pixels < 1):
        raise ValueError(f"{folder}: {CONFIG}: model.frame_pixels = {pixels!r} is no number of pixels; correct it")
    return pixels


def _load_on_base(
    folder: Path, dtype: torch.dtype, frame_pixels: int | None, frames_as: FramesAs, base: str | None
) -> tuple[Backbone, nn.Module]:
    """The base model of adapters, with the adapters merged into it; or that of heads that were trained alone."""
    named = base or base_of(folder)
    if named is None:
        raise ValueError(f"{folder} does not name the base model that it was trained on; give it: --base MODEL")
    check_base(folder, named)
    backbone = load_backbone(named if base else local_folder(named), frame_pixels, frames_as)
    model = backbone.load_model(dtype=dtype)
    if base is not None:
        check_base(folder, named)  # again: it may have been downloaded only now
    return backbone, model if holds_only_heads(folder) else load_adapters(model, folder).merge_and_unload()


@torch.inference_mode()
def _try_out(backbone: Backbone, model: nn.Module) -> None:
    """Encode a frame and run the model on it: damage in the processor's files shows here, before the evaluation."""
    frame = np.zeros((224, 224, 3), np.uint8)
    inputs = backbone.encode([Conversation([frame], [{"role": "user", "content": "?"}])]).inputs
    device = next(model.parameters()).device
    model(**{name: value.to(device) for name, value in inputs.items() if name != "labels"}, use_cache=False)


def _check_heads_complete(checkpoint: Path, heads: CorrespondenceHeads | None, layer_count: int) -> None:
    """Raise if a checkpoint lacks a head that its configuration names: others would silently take its place."""
    config = configuration_of(checkpoint)
    named, loss = config.get("heads"), config.get("loss")
    if not (isinstance(named, dict) and isinstance(named.get("layers"), str) and isinstance(loss, dict)):
        return  # what it was trained with is unknown
    if not (loss.get("corr_weight") or loss.get("depth_weight")):
        return  # trained without geometry
    if named.get("kind") in ("tied", "qk"):
        return  # the model's own projections were supervised
    file, layers = checkpoint / HEADS, named["layers"]
    cure = "get the whole checkpoint again, or use another"
    if heads is None:
        raise OSError(f"{file} is missing, but the checkpoint was trained with heads.layers = {layers!r}; {cure}")
    try:
        expected = parse_layers(layers, layer_count)
    except ValueError as error:
        raise ValueError(f"{checkpoint / CONFIG}: heads.{error}") from error
    if lacking := [layer + 1 for layer in expected if layer not in heads.layers]:
        raise ValueError(
            f"{file} has no head of layer {lacking[0]}, but the checkpoint was trained with heads.layers = {layers!r}; "
            f"{cure}"
        )


def _check_heads_fit(heads: CorrespondenceHeads, backbone: Backbone, source: str) -> None:
    first: Any = heads.by_layer[str(heads.layers[0])]
    width = first.first.in_features
    if width != backbone.hidden_size or max(heads.layers) >= backbone.layer_count:
        raise ValueError(
            f"the heads of {source} are for layers {heads.layers[0]} to {heads.layers[-1]} of width {width}; the model "
            f"has {backbone.layer_count} layers of width {backbone.hidden_size}: they belong to another model"
        )

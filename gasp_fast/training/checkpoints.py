"""Checkpoints of a run: folders `checkpoint-N` that are whole or not there. Knows files and weights, runs nothing.

    adapter_model.safetensors, adapter_config.json    adapters (train.mode lora)
    model.safetensors …, config.json, processor       all weights (train.mode full): loads with transformers alone
    heads.safetensors                                 correspondence heads, and the temperature if it learns
    optimizer.pt, scheduler.pt or global_stepN/       optimiser and schedule; the latter is DeepSpeed's
    rng_state*.pth, trainer_state.json                random numbers of each process, and transformers' own counters
    about.json                                        processes, ZeRO stage, mode, step; what the log has yet to tell

A checkpoint is written to `.checkpoint-N.partial` by all processes and renamed by the first.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gasp_fast.files import write_atomically
from gasp_fast.run_folder import HEADS, finished
from gasp_fast.supervision.head_files import write_heads

from .model import SupervisedModel

ABOUT = "about.json"


def whole(parameter: nn.Parameter) -> Tensor:
    """The full value of a parameter, on every process; ZeRO-3 keeps only a part on each. All must call."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def write_weights(model: SupervisedModel, folder: Path, first: bool) -> None:
    """Trained weights, gathered one by one to the first process's CPU memory."""
    lora = hasattr(model.model, "peft_config")
    weights: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = whole(parameter)
            if first and name.startswith("supervision."):
                heads[name.removeprefix("supervision.").replace(".head.", ".")] = value
            elif first:
                weights[name.removeprefix("model.")] = value.cpu()
    if not first:
        return
    inner: Any = model.model
    if lora:
        inner.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    else:
        inner.save_pretrained(folder, state_dict=weights)
        model.backbone.processor.save_pretrained(folder)
    if heads:
        supervision: Any = model.supervision
        compute = next(iter(supervision.by_layer.values())).head.first.compute
        write_heads(folder / HEADS, heads, compute)


def read_weights(model: SupervisedModel, folder: Path) -> None:
    """The trained weights of a checkpoint into a model that is not sharded."""
    if hasattr(model.model, "peft_config"):
        from peft import set_peft_model_state_dict
        from peft.utils import load_peft_weights

        set_peft_model_state_dict(model.model, load_peft_weights(str(folder), device="cpu"))
    else:
        inner: Any = model.model
        stored = type(inner).from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        inner.load_state_dict(stored.state_dict())
    if model.supervision is not None:
        tensors = load_file(folder / HEADS)
        named = {re.sub(r"^(by_layer\.\d+)\.", r"\1.head.", name): value for name, value in tensors.items()}
        model.supervision.load_state_dict(named)


def write_about(folder: Path, **facts: Any) -> None:
    write_atomically(folder / ABOUT, (json.dumps(facts, indent=1) + "\n").encode())


def read_about(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / ABOUT).read_text())
    except OSError:
        raise OSError(f"run.resume = {str(folder)!r} is no checkpoint of a training run ({ABOUT} is missing)") from None
    return facts


def partial_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def to_resume(out: Path, resume: str) -> Path | None:
    """The checkpoint that `run.resume` speaks of."""
    if resume == "never":
        if finished(out):
            raise ValueError(f"run.out = {str(out)!r} holds checkpoints and run.resume = never; give another run.out")
        return None
    if resume == "auto":
        return next(reversed(finished(out)), None)
    folder = Path(resume)
    if not folder.is_dir():
        raise OSError(f"run.resume = {resume!r}: no such folder; give a checkpoint-N folder, auto or never")
    read_about(folder)
    return folder


def rotate(out: Path, keep: int, best: str | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one. Renamed first: there is never half of one."""
    for folder in finished(out)[:-keep]:
        if best is None or folder.name != Path(best).name:
            doomed = folder.with_name(f".{folder.name}.removed")
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def sweep(out: Path) -> None:
    """Remove what a killed run left half written, or half removed."""
    for leftover in (*out.glob(".checkpoint-*.partial"), *out.glob(".checkpoint-*.removed")):
        shutil.rmtree(leftover, ignore_errors=True)

"""Exports a trained checkpoint as a plain Hugging Face model: adapters merged, correspondence heads dropped.

The exported folder needs no gasp_fast: `AutoModelForImageTextToText.from_pretrained(folder)` and
`AutoProcessor.from_pretrained(folder)` load it.

The files are those of the base model, with the trained weights in their places (`base_files.py`), so that every program
that reads the base model reads the export.

The result is verified. The trained model computes logits for a fixed input (two frames and a question). The merged
model must give the same logits in fp32, and so must the written files, read back with transformers alone.
`W x + B (A x)` and `(W + B A) x` differ only by rounding, and the tolerance is chosen for that. Storing bf16 rounds
the weights themselves: that difference is reported, but not limited.

Everything is written and verified in a temporary folder, which is renamed at the end: the export is complete or absent.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from gasp_fast.backbones import Backbone, Conversation, load_backbone
from gasp_fast.backbones.adapters import load_adapters
from gasp_fast.backbones.base_model import DTYPES, usable_device
from gasp_fast.backbones.fingerprint import check_base
from gasp_fast.backbones.saved_model import load_complete, loading, local_folder
from gasp_fast.files import complete_folder, share_as, write_atomically
from gasp_fast.run_folder import configuration_of

from .base_files import tensor_names, write_like_base
from .card import CARD, model_card
from .checkpoint import Checkpoint, find_checkpoint

Stored = Literal["auto", "fp32", "bf16", "fp16"]
TOLERANCE = 1e-4  # of a logit, in fp32
REPORT = "gasp_export.json"
# Parts of names that no weight of a plain model has.
_FOREIGN = ("lora_", "base_layer", "by_layer.", "modules_to_save", "log_temperature")


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how far its logits are from the trained model's."""

    checkpoint: str  # name of the exported checkpoint
    base: str  # the model it was trained from
    mode: str  # lora or full
    dtype: str  # of the stored weights
    tensors: int
    merge_difference: float  # largest difference of a logit, merged against trained model, both in fp32
    file_difference: float  # the same for the model read back from the files (rounded to `dtype`, computed in fp32)
    largest_logit: float  # the scale of both differences
    trained_difference: float | None  # effect of the adapters: trained against base model; None for a full run
    layout: Literal["base", "transformers"]  # of the files: the base model's, or that of the installed transformers


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    dtype: Stored = "auto",
    device: str | None = None,
    tolerance: float = TOLERANCE,
    progress: Callable[[str], None] = lambda step: None,
) -> ExportReport:
    """Writes the model of a run or checkpoint to the new folder `out`.

    `base` is where the base model is, if not where the run names it, from where it is not downloaded. It must have the
    weights that the adapters were trained on. `dtype` "auto" keeps the base model's.
    `device` defaults to the GPU, if there is one; the whole model has to fit there in fp32. `progress` is called with
    each step's name.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance = {tolerance} must be finite and 0 or more")
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise FileExistsError(f"--out {str(out)!r} exists already; remove it, or name another folder")
    device = usable_device(device)
    checkpoint = find_checkpoint(source, base)
    if checkpoint.mode == "lora":
        check_base(checkpoint.folder, checkpoint.base)
    backbone = load_backbone(checkpoint.processor if base else local_folder(checkpoint.processor))
    stored = _stored_dtype(dtype, backbone)
    with loading(checkpoint.processor):
        inputs = {name: value.to(device) for name, value in probe(backbone).items()}

    progress("loading the trained model")
    model, names = _load_trained(checkpoint, backbone)
    model = model.to(device)
    if base is not None and checkpoint.mode == "lora":
        check_base(checkpoint.folder, checkpoint.base)  # again: it may have been downloaded only now
    progress("computing its logits")
    trained_logits = _logits(model, inputs)
    base_logits = _logits(model, inputs, adapters=False) if checkpoint.mode == "lora" else None
    progress("merging")
    merged: Any = model.merge_and_unload(safe_merge=True) if checkpoint.mode == "lora" else model
    merge_difference = _difference(_logits(merged, inputs), trained_logits)
    _check_difference("merged weights", merge_difference, tolerance)

    with complete_folder(out) as partial:
        progress("writing")
        if names is None:
            merged.to(DTYPES[stored]).save_pretrained(partial)
            backbone.processor.save_pretrained(partial)
        else:
            write_like_base(Path(local_folder(checkpoint.base)), partial, merged.state_dict(), names, DTYPES[stored])
        del model, merged  # before the next model is loaded
        gc.collect()
        progress("reading the files back")
        tensors = _count_tensors(partial)
        file_difference = _difference(_logits(load_plain_model(partial).to(device), inputs), trained_logits)
        if stored == "fp32":
            _check_difference("exported files", file_difference, tolerance)
        report = ExportReport(
            checkpoint=checkpoint.folder.name,
            base=checkpoint.base,
            mode=checkpoint.mode,
            dtype=stored,
            tensors=tensors,
            merge_difference=merge_difference,
            file_difference=file_difference,
            largest_logit=float(trained_logits.abs().max()),
            trained_difference=None if base_logits is None else _difference(trained_logits, base_logits),
            layout="transformers" if names is None else "base",
        )
        usage = [
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            f"model = AutoModelForImageTextToText.from_pretrained({out.name!r})",
            f"processor = AutoProcessor.from_pretrained({out.name!r})",
        ]
        config = configuration_of(checkpoint.folder)
        card = model_card(checkpoint.base, checkpoint.folder, config, usage, heads=False)
        for name, text in ((REPORT, json.dumps(asdict(report), indent=2) + "\n"), (CARD, card)):
            write_atomically(partial / name, text.encode())
            share_as(partial / name)
    return report


# ---- the model ----------------------------------------------------------------------------------------------------


def _load_trained(checkpoint: Checkpoint, backbone: Backbone) -> tuple[Any, dict[str, str] | None]:
    """The trained model in fp32, with unmerged adapters, without heads; and its weights' names in the base's files.

    No names: the base model of a full run is not here, or its files hold some weights in another form.
    """
    if checkpoint.mode == "lora":
        base = backbone.load_model(torch.float32)
        names = tensor_names(Path(local_folder(checkpoint.base)), base)
        return load_adapters(base, checkpoint.folder).eval(), names
    try:
        folder = Path(local_folder(checkpoint.base))
    except OSError:  # the base model is not here
        return load_plain_model(checkpoint.folder), None
    own = folder.samefile(checkpoint.folder)
    names = None if own else tensor_names(folder, load_backbone(folder).load_model(torch.float32))
    return load_plain_model(checkpoint.folder), names


def load_plain_model(folder: Path) -> Any:
    """Loads a folder with transformers alone, in fp32; missing or unused weights are an error."""
    from transformers import AutoModelForImageTextToText

    return load_complete(AutoModelForImageTextToText, folder, unused=False, dtype=torch.float32).eval()


# ---- verification ---------------------------------------------------------------------------------------------------


def probe(backbone: Backbone) -> dict[str, Tensor]:
    """The fixed input for comparing logits: two frames of noise, a question and an answer."""
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (2, 14, 14, 3), dtype=np.uint8)
    frames = list(coarse.repeat(16, axis=1).repeat(16, axis=2))  # [224, 224, 3] each
    question = {"role": "user", "content": "How many boxes are in the room?"}
    answer = {"role": "assistant", "content": "There are 3 boxes."}
    inputs = backbone.encode([Conversation(frames, [question, answer])]).inputs
    return {name: value for name, value in inputs.items() if name != "labels"}


@torch.no_grad()
def _logits(model: nn.Module, inputs: dict[str, Tensor], adapters: bool = True) -> Tensor:
    """float32 [B, S, V], on the CPU."""
    with nullcontext() if adapters else model.disable_adapter():  # type: ignore[operator]
        return model(**inputs).logits.float().cpu()


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def _check_difference(what: str, difference: float, tolerance: float) -> None:
    if not difference <= tolerance:  # also if NaN
        raise ValueError(
            f"the {what} give logits that differ from the trained model's by {difference:.2g}, more than "
            f"tolerance = {tolerance:g}; nothing was exported"
        )


def _count_tensors(folder: Path) -> int:
    """The number of tensors in a folder; a tensor of a head or an adapter is an error."""
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dict)
                count += 1
                if any(part in name for part in _FOREIGN):
                    raise ValueError(f"{name} would be part of the export, but is not a weight of a plain model")
    return count


def _stored_dtype(dtype: str, backbone: Backbone) -> str:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"dtype = {dtype!r} is unknown; choose one of auto, {', '.join(DTYPES)}")
        return dtype
    declared = getattr(backbone.config, "dtype", None)
    return next((name for name, value in DTYPES.items() if declared in (value, str(value).rpartition(".")[2])), "fp32")

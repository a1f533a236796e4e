"""A trained checkpoint becomes a plain Hugging Face model: adapters merged, correspondence heads dropped.

Knows the files of a run and the backbones; must not know how anything was trained. What comes out needs no gasp_fast:
`AutoModelForImageTextToText.from_pretrained(folder)` and `AutoProcessor.from_pretrained(folder)` load it.

The checkpoint (`RUN/checkpoint-N/`, or its RUN, which stands for the newest one) holds either

    adapter_model.safetensors     adapters of a LoRA run; their base model is named in RUN/config.yaml
    model.safetensors, sharded or not, with config.json     all weights of a full run

and beside them heads and the trainer's state, which stay behind.

Nothing is taken on trust. Before the merge the trained model answers a fixed probe (two frames and a question); the
merged model must give the same logits in fp32, and so must the files, read back from disk as a user will read them.
`W x + B (A x)` and `(W + B A) x` are equal but for rounding, so the bound is one of rounding. Storing bf16 rounds the
weights themselves: the difference that makes is reported, and not bounded.

The folder appears whole or not at all: everything is written and checked under a temporary name, then renamed.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn

from .backbones import Backbone, Conversation, load_backbone
from .files import write_atomically
from .run_folder import CONFIG, finished

Stored = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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
    file_difference: float  # the same, for the model that the files give (rounded to `dtype`, computed in fp32)
    largest_logit: float  # to judge the two by
    trained_difference: float | None  # what the adapters changed: trained against base model; None for a full run


@dataclass(frozen=True)
class Checkpoint:
    """The files of one checkpoint, found."""

    folder: Path
    mode: Literal["lora", "full"]
    base: str  # folder or hub name of the model it was trained from
    processor: str  # folder or hub name that has the processor: a full run saves it with its weights


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    dtype: Stored = "auto",
    device: str | None = None,
    tolerance: float = TOLERANCE,
    told: Callable[[str], None] = lambda step: None,
) -> ExportReport:
    """Write the model of a run or checkpoint to the new folder `out`.

    `base` overrides the base model that the run names. `dtype` "auto" keeps the base model's. `device` defaults to
    the GPU, if there is one; the whole model has to fit there in fp32. `told` hears of each step.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"out = {str(out)!r} exists already; remove it, or name another folder")
    checkpoint = find_checkpoint(source, base)
    backbone = load_backbone(checkpoint.processor)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    inputs = {name: value.to(device) for name, value in probe(backbone).items()}

    told("loading the trained model")
    model = _trained_model(checkpoint, backbone).to(device)
    told("asking the trained model")
    before = _logits(model, inputs)
    without = _logits(model, inputs, adapters=False) if checkpoint.mode == "lora" else None
    told("merging")
    merged: Any = model.merge_and_unload(safe_merge=True) if checkpoint.mode == "lora" else model
    merge_difference = _difference(_logits(merged, inputs), before)
    _check_bound("merged weights", merge_difference, tolerance)

    stored = _stored_dtype(dtype, backbone)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    _sweep(out)
    try:
        told("writing")
        partial.mkdir(parents=True)
        merged.to(DTYPES[stored]).save_pretrained(partial)
        backbone.processor.save_pretrained(partial)
        del model, merged
        gc.collect()
        told("reading it back")
        tensors = _check_names(partial)
        file_difference = _difference(_logits(_plain_model(partial).to(device), inputs), before)
        if stored == "fp32":
            _check_bound("exported files", file_difference, tolerance)
        report = ExportReport(
            checkpoint=checkpoint.folder.name,
            base=checkpoint.base,
            mode=checkpoint.mode,
            dtype=stored,
            tensors=tensors,
            merge_difference=merge_difference,
            file_difference=file_difference,
            largest_logit=float(before.abs().max()),
            trained_difference=None if without is None else _difference(before, without),
        )
        write_atomically(partial / REPORT, (json.dumps(asdict(report), indent=2) + "\n").encode())
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


# ---- the checkpoint -------------------------------------------------------------------------------------------------


def find_checkpoint(source: str | os.PathLike[str], base: str | None = None) -> Checkpoint:
    """The checkpoint that `source` is, or the newest of the run that `source` is."""
    source = Path(source)
    if not source.is_dir():
        raise FileNotFoundError(f"source = {str(source)!r} is no folder; pass a run, or one of its checkpoints")
    folder = source
    if not _holds_model(source):
        found = finished(source)
        if not found:
            raise FileNotFoundError(
                f"source = {str(source)!r} holds neither a checkpoint's weights (adapter_model.safetensors or "
                "model.safetensors) nor checkpoint-N folders; pass a run of gasp_fast.train, or one of its checkpoints"
            )
        folder = found[-1]
        if not _holds_model(folder):
            raise FileNotFoundError(
                f"{folder} holds no gathered weights (adapter_model.safetensors or model.safetensors); after ZeRO-3 "
                f"without gathering, run {folder}/zero_to_fp32.py first, or pass an older checkpoint"
            )
    mode: Literal["lora", "full"] = "lora" if (folder / "adapter_config.json").is_file() else "full"
    named = base or _named_base(folder, mode)
    own = base is None and mode == "full" and (folder / "processor_config.json").is_file()
    return Checkpoint(folder, mode, named, str(folder) if own else named)


def _holds_model(folder: Path) -> bool:
    adapters = (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file()
    whole = (folder / "config.json").is_file() and bool(list(folder.glob("model*.safetensors")))
    return adapters or whole


def _named_base(folder: Path, mode: str) -> str:
    """The base model by the run's own configuration, else by the adapter's."""
    for beside in (folder.parent, folder):
        if (beside / CONFIG).is_file():
            said = yaml.safe_load((beside / CONFIG).read_text(encoding="utf-8"))
            name = said.get("model", {}).get("source") if isinstance(said, dict) else None
            if isinstance(name, str):
                return name
    if mode == "lora":
        name = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        if name:
            return str(name)
        raise ValueError(f"{folder} does not say what model its adapters belong to; name it: --base DIR")
    return str(folder)


def _trained_model(checkpoint: Checkpoint, backbone: Backbone) -> Any:
    """The model as it was trained, in fp32, without heads."""
    if checkpoint.mode == "full":
        return _plain_model(checkpoint.folder)
    from peft import PeftModel

    return PeftModel.from_pretrained(backbone.load_model(torch.float32), str(checkpoint.folder)).eval()


def _plain_model(folder: Path) -> Any:
    """What transformers alone makes of a folder, in fp32; every weight must be found, and used."""
    from transformers import AutoModelForImageTextToText

    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        str(folder), dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    model, told = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told[what]:
            names = sorted(map(str, told[what]))
            raise ValueError(f"{folder} has {len(names)} {what.replace('_', ' ')}, such as {names[0]}; cannot export")
    return model.eval()


# ---- checks ---------------------------------------------------------------------------------------------------------


def probe(backbone: Backbone) -> dict[str, Tensor]:
    """The inputs on which models are compared: two frames of noise, a question and an answer."""
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


def _check_bound(what: str, difference: float, tolerance: float) -> None:
    if not difference <= tolerance:  # NaN is not below anything
        raise ValueError(
            f"the {what} give logits that differ from the trained model's by {difference:.2g}, more than "
            f"tolerance = {tolerance:g}; nothing was exported"
        )


def _check_names(folder: Path) -> int:
    """The number of tensors in a folder, none of which may belong to a head or an adapter."""
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dict)
                count += 1
                if any(part in name for part in _FOREIGN):
                    raise ValueError(f"{name} would be part of the export; it is no weight of a plain model")
    return count


def _stored_dtype(dtype: str, backbone: Backbone) -> str:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"dtype = {dtype!r} is unknown; choose one of auto, {', '.join(DTYPES)}")
        return dtype
    declared = getattr(backbone.config, "dtype", None)
    return next((name for name, value in DTYPES.items() if declared in (value, str(value).rpartition(".")[2])), "fp32")


def _sweep(out: Path) -> None:
    """Removes what a killed export to the same place left behind."""
    for partial in out.parent.glob(f".{out.name}.*.partial"):
        shutil.rmtree(partial, ignore_errors=True)

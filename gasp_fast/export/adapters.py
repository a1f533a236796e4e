"""Adapters and heads alone: a small folder with which others train on, or evaluate, on the same base model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from gasp_fast.files import complete_folder, share_as, write_atomically
from gasp_fast.run_folder import HEADS, configuration_of

from .card import CARD, model_card, public_name
from .checkpoint import find_checkpoint

FILES = ("adapter_model.safetensors", "adapter_config.json", HEADS)


def export_adapters(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> list[str]:
    """Copy the adapters and heads of a run or checkpoint to the new folder `out`. Returns the names of the files."""
    out, checkpoint = Path(out), find_checkpoint(source)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise FileExistsError(f"--out {str(out)!r} exists already; remove it, or name another folder")
    if checkpoint.mode != "lora":
        raise ValueError(f"{checkpoint.folder} is of full training, without adapters; leave out --adapters")
    names = [name for name in FILES if (checkpoint.folder / name).is_file()]
    with_heads = HEADS in names
    usage = [
        *(["import gasp_fast"] if with_heads else []),
        "from peft import PeftModel",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f"base, folder = {public_name(checkpoint.base)!r}, {out.name!r}",
        "processor = AutoProcessor.from_pretrained(base)",
        "model = AutoModelForImageTextToText.from_pretrained(base)",
        "model = PeftModel.from_pretrained(model, folder, is_trainable=True)",
        *(["gasp = gasp_fast.attach(model, processor, init=folder)"] if with_heads else []),
    ]
    card = model_card(checkpoint.base, checkpoint.folder, configuration_of(checkpoint.folder), usage, heads=True)
    with complete_folder(out) as partial:
        for name in names:
            shutil.copyfile(checkpoint.folder / name, partial / name)
        write_atomically(partial / CARD, card.encode())
        share_as(partial / CARD)
    return names

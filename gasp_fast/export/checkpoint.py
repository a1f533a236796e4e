"""The checkpoint that is exported.

A checkpoint (`RUN/checkpoint-N/`; RUN means its newest) holds either

    adapter_model.safetensors                     adapters of a LoRA run; RUN/config.yaml names their base model
    config.json, model.safetensors (or shards)    all weights of a full run

and heads and optimizer state, which are not exported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gasp_fast.run_folder import base_of, holds_only_heads, weights_folder


@dataclass(frozen=True)
class Checkpoint:
    """The files of one checkpoint."""

    folder: Path
    mode: Literal["lora", "full"]
    base: str  # folder or hub name of the model it was trained from
    processor: str  # folder or hub name with the processor; a full run saves it with its weights


def find_checkpoint(source: str | os.PathLike[str], base: str | None = None) -> Checkpoint:
    """The checkpoint `source`, or the newest checkpoint of the run `source`."""
    source = Path(source)
    if not source.is_dir():
        raise FileNotFoundError(f"RUN {str(source)!r} is not a folder; pass a run, or one of its checkpoints")
    folder = weights_folder(source)
    if folder is None:
        raise FileNotFoundError(
            f"RUN {str(source)!r} holds neither a checkpoint's weights (adapter_model.safetensors or "
            "model.safetensors) nor checkpoint-N folders; pass a run of gasp_fast.train, or one of its checkpoints"
        )
    if holds_only_heads(folder):
        raise ValueError(
            f"{folder} was trained with train.mode = heads, which changes no weight of the model: there is nothing to "
            f"export, use its base model {base or base_of(folder)!r}"
        )
    mode: Literal["lora", "full"] = "lora" if (folder / "adapter_config.json").is_file() else "full"
    named = base or base_of(folder) or (str(folder) if mode == "full" else None)
    if named is None:
        raise ValueError(f"{folder} does not name the base model of its adapters; give it: --base MODEL")
    own = base is None and mode == "full" and (folder / "processor_config.json").is_file()
    return Checkpoint(folder, mode, named, str(folder) if own else named)

"""Read and write correspondence heads: `heads.safetensors` of a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gasp_fast.files import one_line, write_atomically

from .heads import CorrespondenceHead, CorrespondenceHeads
from .layer_capture import HeadInput
from .precision import Compute


def write_heads(path: Path, tensors: Mapping[str, Tensor], compute: str, reads: HeadInput = "output") -> None:
    """Write the state of a `CorrespondenceHeads` (`by_layer.17.first.weight`, …), its precision and what it reads."""
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    about = json.dumps({"compute": compute, "input": reads})  # one entry: safetensors writes several in random order
    write_atomically(path, save(state, {"heads": about}))


def read_heads(path: str | os.PathLike[str]) -> CorrespondenceHeads:
    """Read the heads of a checkpoint (`checkpoint-N/heads.safetensors`) to the CPU."""
    path = Path(path)
    if not path.is_file():
        raise OSError(f"{path}: no such file; correspondence heads are saved in checkpoints of a training run")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
        tensors.pop("log_temperature", None)  # of the loss
        if "heads" in metadata:
            about = json.loads(metadata["heads"])
        else:  # of an earlier version
            about = {"compute": json.loads(metadata.get("compute", '"fp32"')), "input": "output"}
        heads = _heads_of(tensors, about["compute"], about["input"])
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its tensors are not those of correspondence heads ({one_line(error)})") from error
    return heads


def _heads_of(tensors: Mapping[str, Tensor], compute: Compute, reads: HeadInput) -> CorrespondenceHeads:
    by_layer = {}
    for layer in {int(name.split(".")[1]) for name in tensors}:
        mid, hidden = tensors[f"by_layer.{layer}.first.weight"].shape
        out = tensors[f"by_layer.{layer}.second.weight"].shape[0]
        by_layer[layer] = CorrespondenceHead(hidden, mid, out, compute)
    heads = CorrespondenceHeads(by_layer, reads)
    heads.load_state_dict(tensors)
    return heads

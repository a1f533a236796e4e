"""Read and write correspondence heads: `heads.safetensors` of a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gasp_fast.files import write_atomically

from .heads import CorrespondenceHead, CorrespondenceHeads
from .precision import Compute


def write_heads(path: Path, tensors: Mapping[str, Tensor], compute: str) -> None:
    """Write the state of a `CorrespondenceHeads` (`by_layer.17.first.weight`, …) and the precision of its products."""
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(state, {"compute": json.dumps(compute)}))


def read_heads(path: str | os.PathLike[str]) -> CorrespondenceHeads:
    """Read the heads of a checkpoint (`checkpoint-N/heads.safetensors`) to the CPU."""
    path = Path(path)
    if not path.is_file():
        raise OSError(f"{path}: no such file; correspondence heads are saved in checkpoints of a training run")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            compute = json.loads((file.metadata() or {}).get("compute", '"fp32"'))
        tensors.pop("log_temperature", None)  # of the loss
        heads = _heads_of(tensors, compute)
    except (SafetensorError, RuntimeError, LookupError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: its tensors are not those of correspondence heads ({reason})") from error
    return heads


def _heads_of(tensors: Mapping[str, Tensor], compute: Compute) -> CorrespondenceHeads:
    by_layer = {}
    for layer in {int(name.split(".")[1]) for name in tensors}:
        mid, hidden = tensors[f"by_layer.{layer}.first.weight"].shape
        out = tensors[f"by_layer.{layer}.second.weight"].shape[0]
        by_layer[layer] = CorrespondenceHead(hidden, mid, out, compute)
    heads = CorrespondenceHeads(by_layer)
    heads.load_state_dict(tensors)
    return heads

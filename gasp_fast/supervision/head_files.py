"""Read and write correspondence heads: `heads.safetensors` of a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from gasp_fast.files import write_atomically

from .heads import CorrespondenceHead, CorrespondenceHeads


def write_heads(path: Path, tensors: Mapping[str, Tensor], compute: str) -> None:
    """Write the state of a `CorrespondenceHeads` (`by_layer.17.first.weight`, …) and the precision of its products."""
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(state, {"compute": json.dumps(compute)}))


def read_heads(path: str | os.PathLike[str]) -> CorrespondenceHeads:
    """Read the heads of a checkpoint (`checkpoint-N/heads.safetensors`) to the CPU."""
    path = Path(path)
    if not path.is_file():
        raise OSError(f"{path}: no such file; correspondence heads are saved in checkpoints of a training run")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        compute = json.loads((file.metadata() or {}).get("compute", '"fp32"'))
    by_layer = {}
    for layer in {int(name.split(".")[1]) for name in tensors if name.startswith("by_layer.")}:
        mid, hidden = tensors[f"by_layer.{layer}.first.weight"].shape
        out = tensors[f"by_layer.{layer}.second.weight"].shape[0]
        by_layer[layer] = CorrespondenceHead(hidden, mid, out, compute)
    heads = CorrespondenceHeads(by_layer)
    heads.load_state_dict({name: tensor for name, tensor in tensors.items() if name.startswith("by_layer.")})
    return heads

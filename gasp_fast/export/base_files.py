"""The files of a base model, with trained weights in the places of its own.

transformers may give weights other names in memory than in files, and write another configuration than it read: what
transformers 5 saves of Qwen2.5-VL and of LLaVA-NeXT-Video, transformers 4 does not read. So an export keeps the base
model's configuration, processor, tokenizer, shards and names of tensors. A weight's tensor in the files is recognised
by its value: the base model is loaded, and each of its weights is looked for, first where the names agree most.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

INDEX = "model.safetensors.index.json"
# Weights in other formats, code, and the card of the base model, which is not the export's.
_LEFT_OUT = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".py", ".md"}
_DTYPE_KEYS = ("torch_dtype", "dtype")  # of transformers 4 and 5


def tensor_names(base: Path, model: nn.Module) -> dict[str, str] | None:
    """Name in `model` -> name in the files of `base`, for each weight; `model` holds the weights of the files.

    None if a weight is not in the files as it is in memory, for example because files hold its parts.
    """
    files = {name: path for path in sorted(base.glob("*.safetensors")) for name in _shapes(path)}
    shapes = {name: shape for path in set(files.values()) for name, shape in _shapes(path).items()}
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, shape in shapes.items():
        by_shape.setdefault(shape, []).append(name)
    found: dict[str, str] = {}
    known: set[int] = set()  # addresses of the weights that are found
    missing = []
    for name, value in model.state_dict().items():
        candidates = sorted(by_shape.get(tuple(value.shape), []), key=lambda other: -_common_ending(name, other))
        match = next((other for other in candidates if _holds(files[other], other, value)), None)
        if match is None:
            missing.append(value.data_ptr())
            continue
        found[name] = match
        by_shape[tuple(value.shape)].remove(match)
        known.add(value.data_ptr())
    return found if known.issuperset(missing) else None  # a tied weight may be in the files once


def write_like_base(
    base: Path, out: Path, state: Mapping[str, Tensor], names: Mapping[str, str], dtype: torch.dtype
) -> None:
    """Write the weights of `state`, as `dtype`, and all else as it is in `base`."""
    in_files = {names[name]: value for name, value in state.items() if name in names}
    size = 0
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {}
            for name in file.keys():  # noqa: SIM118 (not a dict)
                value = in_files.get(name)
                value = file.get_tensor(name) if value is None else value.cpu()
                value = value.to(dtype) if value.is_floating_point() else value
                tensors[name] = value.contiguous().clone()  # tied weights share memory
                size += value.nbytes
            save_file(tensors, out / path.name, file.metadata() or {"format": "pt"})
    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix not in _LEFT_OUT and not path.name.startswith("."):
            shutil.copyfile(path, out / path.name)
    _declare(out / "config.json", dtype)
    if (index := out / INDEX).is_file():
        tree = json.loads(index.read_text(encoding="utf-8"))
        if tree.get("metadata", {}).get("total_size") != size:
            tree["metadata"] = {**tree.get("metadata", {}), "total_size": size}
            index.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _declare(config: Path, dtype: torch.dtype) -> None:
    """State the type of the weights in `config.json`; the file is left as it is where it does already."""
    text = config.read_text(encoding="utf-8")
    tree, name = json.loads(text), str(dtype).removeprefix("torch.")
    parts = [part for part in (tree, *tree.values()) if isinstance(part, dict)]
    stated = [(part, key) for part in parts for key in _DTYPE_KEYS if part.get(key) is not None]
    if {part[key] for part, key in stated} == {name}:
        return
    for part, key in stated or [(tree, "torch_dtype")]:
        part[key] = name
    config.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _holds(path: Path, name: str, value: Tensor) -> bool:
    with safe_open(path, "pt") as file:
        return torch.equal(file.get_tensor(name).to(value.dtype), value.cpu())


def _common_ending(first: str, second: str) -> int:
    """Number of equal last parts of two dotted names."""
    parts = zip(reversed(first.split(".")), reversed(second.split(".")), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], parts)))

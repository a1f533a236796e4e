"""Files of a G²VLM model, with the names that its authors gave its weights. Only safetensors are read and written.

A folder holds `model.safetensors` (or several such files) and the configurations `text_config.json`, `vit_config.json`
and `dino_config.json`, as InternRobotics/G2VLM-2B-MoT does. The names are those of the authors' model code; they have
not been compared with their checkpoint, which is not at hand. Weights of the geometric expert have names with
`_moe_geo`; our product of queries, keys and values is three of theirs. `geometry_config.json`, ours, holds the sizes of
the heads and the `ExpertsConfig`; a folder without it has the authors' sizes.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gasp_fast.backbones.saved_model import load_complete, loading
from gasp_fast.files import one_line, read_json, replacing, write_atomically

from .experts import Expert, ExpertsConfig
from .heads import GeometryHeads, HeadsConfig
from .model import G2VLM

WEIGHTS, TEXT, VIT, DINO = "model.safetensors", "text_config.json", "vit_config.json", "dino_config.json"
GEOMETRY = "geometry_config.json"
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")

# Beginning of our name -> of theirs.
PARTS = {
    "embedding.": "language_model.model.embed_tokens.",
    "lm_head.": "language_model.lm_head.",
    "experts.semantic_norm.": "language_model.model.norm.",
    "experts.geometric_norm.": "language_model.model.norm_moe_geo.",
    "visual.": "vit_model.",
    "encoder.": "dino_model.",
    "patch_map.": "dino2llm.",
    "heads.": "",
    "gasp.": "gasp.",  # ours alone
}
# Module of an `Expert` -> theirs; {} is nothing in the semantic expert and _moe_geo in the geometric one.
MODULES = {
    "input_norm": ("input_layernorm{}",),
    "qkv": ("self_attn.q_proj{}", "self_attn.k_proj{}", "self_attn.v_proj{}"),
    "q_norm": ("self_attn.q_norm{}",),
    "k_norm": ("self_attn.k_norm{}",),
    "out": ("self_attn.o_proj{}",),
    "post_norm": ("post_attention_layernorm{}",),
    "gate": ("mlp{}.gate_proj",),
    "up": ("mlp{}.up_proj",),
    "down": ("mlp{}.down_proj",),
    "attention_scale": ("ls1",),
    "mlp_scale": ("ls2",),
}
# Part of a name in DINOv2 of newer transformers -> in older ones, and in checkpoints.
ENCODER = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
}


def official_names(name: str) -> list[str]:
    """The names of one of our weights in a checkpoint: one, or those of its row blocks."""
    layer = re.fullmatch(r"experts\.layers\.(\d+)\.(geometric|semantic)\.(\w+)\.(\w+)", name)
    if layer:
        index, kind, module, weight = layer.groups()
        suffix = "_moe_geo" if kind == "geometric" else ""
        return [f"language_model.model.layers.{index}.{part.format(suffix)}.{weight}" for part in MODULES[module]]
    ours = next(part for part in PARTS if name.startswith(part))
    theirs = PARTS[ours] + name.removeprefix(ours)
    if ours == "encoder.":
        for new, old in ENCODER.items():
            theirs = theirs.replace(new, old)
    return [theirs]


def new_model(qwen: str | Path, encoder: str | Path, heads: nn.Module, config: ExpertsConfig | None = None) -> G2VLM:
    """From folders or hub names of Qwen2-VL and of DINOv2 with registers."""
    from transformers import Dinov2WithRegistersModel, Qwen2VLForConditionalGeneration

    language = load_complete(Qwen2VLForConditionalGeneration, qwen, dtype=torch.float32)
    return G2VLM(language, load_complete(Dinov2WithRegistersModel, encoder, dtype=torch.float32), heads, config)


def load_model(folder: str | Path, heads: nn.Module | None = None, config: ExpertsConfig | None = None) -> G2VLM:
    """From a folder of `save_model` or of the authors. Without `heads` or `config` they are those of the folder."""
    from transformers import (
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
    )

    folder = Path(folder)
    text, vit, dino = (read_json(folder / name) for name in (TEXT, VIT, DINO))
    heads, config = _geometry(folder, heads, config, text.get("hidden_size", HeadsConfig.hidden))
    tokens = {name: text.pop(name) for name in TOKENS if name in text}
    for sizes in (text, vit, dino):
        sizes.pop("model_type", None)
    with loading(folder):
        qwen = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vit, **tokens))
        encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**dino))
    model = G2VLM(qwen.float(), encoder.float(), heads, config)  # the configurations may name another type
    load_weights(model, folder)
    return model


def _geometry(
    folder: Path, heads: nn.Module | None, config: ExpertsConfig | None, width: int
) -> tuple[nn.Module, ExpertsConfig | None]:
    """What is not given, from `geometry_config.json` or as the authors have it for hidden states of this width."""
    path = folder / GEOMETRY
    if not path.is_file():
        return heads or GeometryHeads(HeadsConfig(hidden=width, width=width)), config
    stored = read_json(path)
    try:
        return heads or GeometryHeads(HeadsConfig(**stored["heads"])), config or ExpertsConfig(**stored["experts"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({one_line(error)}); get the folder again") from error


def load_weights(model: G2VLM, folder: str | Path) -> list[str]:
    """Copy the weights of a folder into the model. Returns the names of those not copied."""
    files = sorted(Path(folder).glob("*.safetensors"))
    with loading(folder):
        opened = [safe_open(path, "pt") for path in files]
    at = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
    weights = model.state_dict()
    wanted = {name: official_names(name) for name in weights}
    missing = sorted(name for names in wanted.values() for name in names if name not in at)
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} weights are in no safetensors file, such as {missing[0]}; name a folder of a "
            f"complete G²VLM model; without a {GEOMETRY} its heads must have the authors' sizes"
        )
    with torch.no_grad():
        for name, parameter in weights.items():
            _fill(parameter, [at[part].get_tensor(part) for part in wanted[name]], wanted[name][0], folder)
    return sorted(set(at) - {name for names in wanted.values() for name in names})


def save_model(model: G2VLM, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write weights, as `dtype` if given, and configurations."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    qwen = model.qwen_config
    text = {**qwen.text_config.to_dict(), **{name: getattr(qwen, name) for name in TOKENS}}
    for name, content in ((TEXT, text), (VIT, qwen.vision_config.to_dict()), (DINO, model.encoder.config.to_dict())):
        write_atomically(folder / name, json.dumps(content, indent=2, default=str).encode())
    if isinstance(model.heads, GeometryHeads):
        ours = {"heads": asdict(model.heads.config), "experts": asdict(model.config)}
        write_atomically(folder / GEOMETRY, json.dumps(ours, indent=2).encode())
    weights = {name: tensor.to(dtype or tensor.dtype) for name, tensor in official_weights(model).items()}
    with replacing(folder / WEIGHTS) as path:
        save_file(weights, path, {"format": "pt"})


def official_weights(model: G2VLM) -> dict[str, Tensor]:
    """All weights under their names in a checkpoint, on the CPU."""
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        names = official_names(name)
        parts = tensor.detach().cpu().split(row_blocks(model, name)) if len(names) > 1 else [tensor.detach().cpu()]
        weights |= {theirs: part.contiguous().clone() for theirs, part in zip(names, parts, strict=True)}
    return weights


def row_blocks(model: G2VLM, name: str) -> list[int]:
    """Rows of queries, keys and values in a fused weight."""
    expert: Any = model.get_submodule(name.rsplit(".", 2)[0])
    assert isinstance(expert, Expert)
    return expert.qkv_rows


def _fill(parameter: Tensor, parts: list[Tensor], name: str, folder: str | Path) -> None:
    stored = torch.cat(parts)
    if stored.shape != parameter.shape:
        raise ValueError(
            f"{folder}: {name} has the shape {tuple(stored.shape)}, the model's {tuple(parameter.shape)}; load it into "
            "a model of the folder's own configuration"
        )
    parameter.copy_(stored)

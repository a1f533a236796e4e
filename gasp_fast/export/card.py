"""`README.md` of an export: the model card that the Hugging Face hub shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gasp_fast

CARD = "README.md"
SETTINGS = (  # of the run, as they are named in its recipe
    ("train", "mode"), ("train", "steps"), ("train", "epochs"), ("train", "batch_size"), ("train", "learning_rate"),
    ("lora", "rank"), ("heads", "layers"), ("heads", "kind"), ("loss", "lm_weight"), ("loss", "corr_weight"),
    ("loss", "depth_weight"), ("loss", "temperature"),
)  # fmt: skip


def model_card(base: str, checkpoint: str, config: Mapping[str, Any], usage: Sequence[str], heads: bool) -> str:
    """The card of a model, or with `heads` of adapters and heads alone. `config` is the run's configuration."""
    lines = [
        "---",
        f"base_model: {json.dumps(public_name(base))}",
        f"library_name: {'peft' if heads else 'transformers'}",
    ]
    lines += ["pipeline_tag: image-text-to-text", "tags:", "- gasp", "- correspondence", "---", ""]
    lines += [f"# {Path(base).name}, trained with geometric supervision", ""]
    lines.append(
        f"`{Path(base).name}`, fine-tuned by gasp_fast {gasp_fast.__version__} ({checkpoint}) with the supervision of "
        "*Beyond 3D VQAs: Injecting 3D Spatial Priors into Vision-Language Models* (CVPR 2026): correspondence and "
        "depth losses on the visual tokens of its decoder layers."
    )
    lines += ["", "```python", *usage, "```"]
    stated = [(".".join(keys), _value(config, keys)) for keys in SETTINGS]
    if rows := [f"| `{name}` | {value} |" for name, value in stated if value is not None]:
        lines += ["", "| setting | value |", "| --- | --- |", *rows]
    return "\n".join(lines) + "\n"


def public_name(base: str) -> str:
    """A hub name as it is; of a folder its last part, because the path is of this machine."""
    return Path(base).name if Path(base).is_dir() else base


def _value(config: Mapping[str, Any], keys: Sequence[str]) -> Any:
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str | int | float) else None

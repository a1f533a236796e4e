"""`README.md` of an export: the model card that the Hugging Face hub shows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gasp_fast
from gasp_fast.files import read_json
from gasp_fast.run_folder import REPORT

CARD = "README.md"
BENCHMARKS = "benchmarks/results.json"  # of a run, as docs/benchmarks.md has it
DATA = (
    ("data", "scenes", "root"),
    ("data", "qa", "root"),
    ("data", "vqa", "root"),
)  # folders
SETTINGS = (  # of the run, as they are named in its recipe
    ("train", "mode"), ("train", "steps"), ("train", "epochs"), ("train", "batch_size"), ("train", "learning_rate"),
    ("lora", "rank"), ("heads", "layers"), ("heads", "kind"), ("loss", "lm_weight"), ("loss", "corr_weight"),
    ("loss", "depth_weight"), ("loss", "temperature"),
)  # fmt: skip


def model_card(base: str, checkpoint: Path, config: Mapping[str, Any], usage: Sequence[str], heads: bool) -> str:
    """The card of a model, or with `heads` of adapters and heads alone. `config` is the run's configuration."""
    licence = licence_of(base)
    lines = [
        "---",
        f"base_model: {json.dumps(public_name(base))}",
        f"library_name: {'peft' if heads else 'transformers'}",
        *([f"license: {licence}"] if licence else []),
    ]
    lines += ["pipeline_tag: image-text-to-text", "tags:", "- gasp", "- correspondence", "---", ""]
    lines += [f"# {Path(base).name}, trained with geometric supervision", ""]
    lines.append(
        f"`{Path(base).name}`, fine-tuned by gasp_fast {gasp_fast.__version__} ({checkpoint.name}) with the "
        "supervision of *Beyond 3D VQAs: Injecting 3D Spatial Priors into Vision-Language Models* (CVPR 2026): "
        "correspondence and depth losses on the visual tokens of its decoder layers."
    )
    lines += ["", "```python", *usage, "```"]
    stated = [(".".join(keys), _value(config, keys)) for keys in SETTINGS]
    stated += [(".".join(keys), Path(str(value)).name) for keys in DATA if (value := _value(config, keys))]
    if rows := [f"| `{name}` | {value} |" for name, value in stated if value is not None]:
        lines += ["", "| setting | value |", "| --- | --- |", *rows]
    if rows := [f"| {name} | {value} |" for name, value in measured(checkpoint.parent)]:
        lines += ["", "| measured on the run | value |", "| --- | --- |", *rows]
    if licence:
        lines += ["", f"The base model's licence, {licence}, applies to it; the training data have their own."]
    return "\n".join(lines) + "\n"


def measured(run: Path) -> list[tuple[str, str]]:
    """What the run's report and benchmarks say, where they were made before the export."""
    found = []
    if (run / REPORT / "report.json").is_file():
        report = read_json(run / REPORT / "report.json")
        pck = report["by_features"][report["features"]]["pck"]
        found.append((f"PCK, {report['features']}, layer {pck['peak_layer']}", f"{pck['peak']:.3f}"))
    if (run / BENCHMARKS).is_file():
        for row in read_json(run / BENCHMARKS)["benchmarks"]:
            change = f", {100 * row['difference']['mean']:+.1f} against the base" if "difference" in row else ""
            found.append((row["title"], f"{100 * row['model']['score']:.1f} %{change}"))
    return found


def licence_of(base: str) -> str | None:
    """The licence in the card of a base model that is a folder here."""
    card = Path(base) / CARD
    if not card.is_file():
        return None
    named = re.search(r"\A---\n.*?^license: *([\w.-]+) *$.*?^---$", card.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return named[1] if named else None


def public_name(base: str) -> str:
    """A hub name as it is; of a folder its last part, because the path is of this machine."""
    return Path(base).name if Path(base).is_dir() else base


def _value(config: Mapping[str, Any], keys: Sequence[str]) -> Any:
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str | int | float) else None

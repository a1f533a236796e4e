"""Run by `test_transformers_4.py` with transformers 4 on the path: `create FOLDER`, or `logits FOLDER INPUTS OUT`."""

import importlib.util
import json
import sys
from pathlib import Path

SHIM = Path(__file__).parents[2] / "gasp_fast" / "backbones" / "torchvision_shim.py"
spec = importlib.util.spec_from_file_location("torchvision_shim", SHIM)  # without gasp_fast, which needs transformers 5
shim = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shim)
shim.install()

import torch  # noqa: E402
import transformers  # noqa: E402

assert transformers.__version__.startswith("4."), transformers.__version__


def create(folder: Path) -> None:
    """Replace configuration and weights of the tiny model in `folder` by those that transformers 4 writes."""
    new = json.loads((folder / "config.json").read_text())
    text = dict(new["text_config"])
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    if "mrope_section" in rope:
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    kind = transformers.CONFIG_MAPPING[new["model_type"]]
    others = {key: value for key, value in new.items() if key not in ("text_config", "model_type", "dtype")}
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(kind(text_config=text, **others))
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / file).unlink()
    model.save_pretrained(folder, max_shard_size="500KB")


def logits(folder: Path, inputs: Path, out: Path) -> None:
    model, loading = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    given = torch.load(inputs, weights_only=True)
    given.pop("mm_token_type_ids", None)  # of transformers 5
    with torch.no_grad():
        torch.save(model.eval()(**given).logits, out)


if __name__ == "__main__":
    {"create": create, "logits": logits}[sys.argv[1]](*map(Path, sys.argv[2:]))

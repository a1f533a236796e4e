"""An export of a base model that transformers 4.57 wrote is read by it, with the trained model's logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from gasp_fast.backbones import load_backbone
from gasp_fast.backbones.tiny import TinyConfig, build_tiny
from gasp_fast.export import export, probe

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "transformers-4.57.1"
PACKAGES = ["transformers==4.57.1", "huggingface-hub==0.36.0", "tokenizers==0.22.1", "requests", "urllib3", "certifi"]
PACKAGES += ["charset_normalizer", "idna"]
FAMILIES = ("qwen2_5_vl", "llava_next_video")


@pytest.fixture(scope="module")
def transformers_4():
    """Runs `transformers_4.py`. transformers 4.57.1 is installed beside the environment, once."""
    if not (SITE / "complete").exists():
        # Without compiling: an import compiles what it needs.
        install = ["pip", "install", "-q", "--no-compile", "--no-deps", "--upgrade", "--target", str(SITE), *PACKAGES]
        done = subprocess.run([sys.executable, "-m", *install], capture_output=True, text=True, timeout=400)
        if done.returncode:
            pytest.skip(f"transformers 4.57.1 cannot be installed here: {done.stderr.strip().splitlines()[-1][:200]}")
        (SITE / "complete").touch()

    def run(*words):
        environment = {**os.environ, "PYTHONPATH": str(SITE), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        script = Path(__file__).with_name("transformers_4.py")
        command = [sys.executable, str(script), *map(str, words)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, transformers_4, tmp_path_factory):
    """A base model as the hub has it: written by transformers 4, in shards."""
    folder = build_tiny(tmp_path_factory.mktemp("base") / request.param, TinyConfig(model_type=request.param))
    transformers_4("create", folder)
    return folder


def logits_4(transformers_4, folder, backbone, work):
    torch.save(probe(backbone), work / "inputs.pt")
    transformers_4("logits", folder, work / "inputs.pt", work / "logits.pt")
    return torch.load(work / "logits.pt", weights_only=True)


@pytest.mark.slow
def test_transformers_4_reads_an_export_and_its_files_are_those_of_the_base(base, transformers_4, tmp_path):
    backbone = load_backbone(base)
    model = backbone.load_model(torch.float32)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=backbone.lora_targets, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "run" / "checkpoint-1")
    (tmp_path / "run" / "config.yaml").write_text(f"model:\n  source: {base}\n")
    report = export(tmp_path / "run", tmp_path / "plain")
    with torch.no_grad():
        expected = adapted.eval()(**probe(backbone)).logits
    found = logits_4(transformers_4, tmp_path / "plain", backbone, tmp_path)
    assert report.layout == "base" and (found - expected).abs().max() < 1e-4
    assert (expected - logits_4(transformers_4, base, backbone, tmp_path)).abs().max() > 0.01  # training did something

    ours, theirs = ({path.name: path for path in folder.iterdir()} for folder in (tmp_path / "plain", base))
    assert ours.keys() - theirs.keys() == {"gasp_export.json", "README.md"} and theirs.keys() <= ours.keys()
    shards = [name for name in theirs if name.endswith(".safetensors")]
    assert len(shards) > 1
    for name in shards:
        one, other = load_file(ours[name]), load_file(theirs[name])
        assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in other.items()}
    for name in theirs.keys() - set(shards):
        assert ours[name].read_bytes() == theirs[name].read_bytes(), name

    export(tmp_path / "run", tmp_path / "bf16", dtype="bf16")
    stated = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert (stated.get("torch_dtype") or stated["dtype"]) == "bfloat16"
    index = json.loads((tmp_path / "bf16" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for path in (tmp_path / "bf16").glob("*.safetensors") for tensor in load_file(path).values()
    )
    assert (logits_4(transformers_4, tmp_path / "bf16", backbone, tmp_path) - expected).abs().max() < 0.5


@pytest.mark.slow
def test_a_full_run_is_exported_in_the_layout_of_its_base(base, transformers_4, tmp_path):
    backbone = load_backbone(base)
    model = backbone.load_model(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "run" / "checkpoint-1")
    backbone.processor.save_pretrained(tmp_path / "run" / "checkpoint-1")
    (tmp_path / "run" / "config.yaml").write_text(f"model:\n  source: {base}\ntrain:\n  mode: full\n")
    report = export(tmp_path / "run", tmp_path / "plain")
    with torch.no_grad():
        expected = model.eval()(**probe(backbone)).logits
    assert report.layout == "base"
    assert (logits_4(transformers_4, tmp_path / "plain", backbone, tmp_path) - expected).abs().max() < 1e-4

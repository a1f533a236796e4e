"""`train.checkpointing` decides which decoder layers keep their activations. Gradients do not depend on it."""

from types import SimpleNamespace

import pytest
import torch
from support import liger_stand_in
from support.planning import plan_of, recipe

from gasp_fast.collator import Collator
from gasp_fast.planning.shapes import QWEN2_5_VL_7B
from gasp_fast.training.distributed import Processes
from gasp_fast.training.dry_run import describe
from gasp_fast.training.model import build_model
from gasp_fast.training.optim import OptimisationConfig
from gasp_fast.training.stream import SampleStream, Share
from gasp_fast.training.workload import setup_here

CPU = torch.device("cpu")


def kept_by(model):
    layers = model.backbone.decoder_layers(model.model)
    return [number for number, layer in enumerate(layers) if not layer.gradient_checkpointing]


@pytest.mark.parametrize(
    ("checkpointing", "kept"),
    [
        ("auto", [0, 1, 2, 3]),  # on a CPU
        ("off", [0, 1, 2, 3]),
        ("full", []),
        ("non_reentrant", []),
        ("reentrant", []),
        ("every:1", []),
        ("every:2", [1, 3]),
        ("every:3", [0, 2, 3]),
        ("every:9", [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_step_is_the_same_whichever_layers_are_kept(config, family, mode, checkpointing, kept):
    gradients = []
    for setting in ("off", checkpointing):
        settings = config(family, train={"checkpointing": setting, "mode": mode})
        model = build_model(settings, CPU).train()
        batch = Collator(model.backbone)([SampleStream(settings.data)[0]])
        model(**batch)["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert kept_by(model) == kept
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("wrong", ["every:0", "every", "every:-2", "some", "none", ""])
def test_what_checkpointing_cannot_be_is_a_clear_error(wrong):
    with pytest.raises(
        ValueError, match=f"train.checkpointing = '{wrong}' must be auto, off, full, reentrant, or every"
    ):
        OptimisationConfig(checkpointing=wrong)


def test_automatic_checkpointing_keeps_the_last_layers():
    """Backward frees the last layers before it needs memory to recompute the others."""
    assert OptimisationConfig().kept_layers(6, fitting=2) == [4, 5]
    assert OptimisationConfig().kept_layers(6, fitting=0) == []
    assert OptimisationConfig(checkpointing="full").kept_layers(6, fitting=2) == []


def test_the_memory_of_the_gpu_decides_how_many_layers_are_kept_as_the_plan_says(monkeypatch):
    settings, backbone = recipe("deepspeed=null", "train.batch_size=4"), SimpleNamespace(llama_layers=True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1_000_000_000)  # in this process's own cache
    kept = []
    for name, memory in (
        ("NVIDIA H200", 150.1e9),
        ("NVIDIA H100 80GB HBM3", 85.0e9),
        ("NVIDIA H100 80GB HBM3", 42.4e9),  # other processes hold the rest
    ):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, name=name: SimpleNamespace(name=name))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=memory - 1e9: (free, 150e9))
        kept.append(setup_here(settings, QWEN2_5_VL_7B, backbone, torch.device("cuda")).kept_layers)
    planned = [
        plan_of("deepspeed=null", "train.batch_size=4", "model.liger=false", gpus=1, gpu=gpu).setup.kept_layers
        for gpu in ("h200", "h100")
    ]
    assert kept == [*planned, 0] and 28 == kept[0] > kept[1] > 0


def test_the_start_of_a_run_says_how_many_layers_are_kept_and_in_how_much_memory(config, monkeypatch):
    settings = config(model={"dtype": "bf16"}, train={"checkpointing": "every:2"})
    model = build_model(settings, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="NVIDIA H200"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (150e9, 150e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("transformers.utils.is_flash_attn_3_available", lambda: True)
    liger_stand_in.install(monkeypatch)
    words = describe(settings, model, Share(0, 1, 2, 1), Processes(0, 1, torch.device("cuda")))
    assert "FlashAttention 3 attention, Liger's norms and MLPs" in words
    assert "keeps activations of 2 of 4 decoder layers: 3 of 141 GB, by estimate" in words  # what kernels reserve

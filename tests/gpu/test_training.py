"""`gasp_fast.train` on a GPU: it stops and resumes, its runs are evaluated and exported, and a CPU agrees with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.gpu import CPU, DEVICE, ON_A_GPU, assert_agree, assert_finite, step_on
from support.runs import log_of, tensors_of, write_config
from support.tiny_training import FAMILIES, loop_on

from gasp_fast import cli
from gasp_fast.collator import Collator
from gasp_fast.train import train
from gasp_fast.training.loader import SteadyCollator
from gasp_fast.training.model import build_model
from gasp_fast.training.stream import SampleStream

pytestmark = ON_A_GPU
BF16 = {"model": {"dtype": "bf16"}, "heads": {"compute": "bf16"}}
CHOICES = {
    "adapters": {},
    "all weights": {"train": {"mode": "full"}},
    "heads alone": {"train": {"mode": "heads"}},
    "queries and keys": {"heads": {"kind": "qk"}},
    "groups of queries": {"heads": {"kind": "correspondence_and_qk", "attention_heads": "groups"}},
    "pairs of frames": {"model": {"frames_as": "video_pairs"}},
    "packs": {"train": {"packing": True, "micro_batch_size": 2}},
}


def merged(*groups):
    """Parts of a configuration; later ones add to earlier ones."""
    names = {name for group in groups for name in group}
    return {name: {key: value for group in groups for key, value in group.get(name, {}).items()} for name in names}


def distance(ours, theirs):
    return sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_is_stopped_and_resumed_ends_as_if_it_had_not_been(settings, family, tmp_path):
    """Attention adds up its gradients in any order: the last bits differ, and Adam makes some of them visible."""

    def recipe(name):
        checkpointed = {"steps": 4, "checkpointing": "full"}
        return settings(family, **BF16, train=checkpointed, run={"out": str(tmp_path / name), "save_every": 2})

    train(recipe("whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    train(recipe("parts"))
    logs = [log_of(tmp_path / name) for name in ("whole", "parts")]
    assert [record["step"] for record in logs[1]] == [1, 2, 3, 4]
    for whole, parts in zip(*logs, strict=True):
        assert_finite(whole)
        assert parts["loss"] == pytest.approx(whole["loss"], rel=2e-3)
    before, whole, parts = (
        tensors_of(tmp_path / folder, "[ah]*.safetensors")  # adapters and heads
        for folder in ("whole/checkpoint-2", "whole/checkpoint-4", "parts/checkpoint-4")
    )
    assert before.keys() == whole.keys() == parts.keys() and distance(whole, before) > 0
    assert distance(parts, whole) < 0.1 * distance(whole, before)


@pytest.fixture
def run(settings, family) -> Path:
    recipe = settings(family, **BF16, train={"steps": 2, "checkpointing": "full"})
    assert cli.main(["train", str(write_config(recipe, Path(recipe.run.out).with_suffix(".yaml")))]) == 0
    return Path(recipe.run.out)


def test_a_run_is_evaluated(run, assets, tmp_path):
    out, sizes = tmp_path / "report", ["--sequences", "2", "--frames", "3", "--grid", "5", "--max-gap", "6"]
    words = ["--model", run, "--scenes", assets.scenes, "--out", out, *sizes, "--features", "head,qk,hidden"]
    assert cli.main(["evaluate", *map(str, words)]) == 0
    assert "NaN" not in (out / "report.json").read_text() and json.loads((out / "report.json").read_text())


def test_a_run_is_exported(run, tmp_path):
    assert cli.main(["export", str(run), "--out", str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_cpu_agrees_with_the_first_step(settings, choice, dtype):
    model, batch = model_and_batch(settings, choice, "fp32")
    expected = step_on(CPU, model, lambda device: model(**batch))
    if dtype == "bf16":
        model, batch = model_and_batch(settings, choice, dtype)
    found = step_on(DEVICE, model, lambda device: model(**{name: value.to(device) for name, value in batch.items()}))
    assert_agree(found, expected, dtype)


def model_and_batch(settings, choice, dtype):
    """A scene and a question; the model is on the CPU."""
    recipe = settings(**merged(CHOICES[choice], {"model": {"dtype": dtype}, "heads": {"compute": dtype}}))
    model, stream = build_model(recipe, CPU).train(), SampleStream(recipe.data)
    several = [stream[position] for position in range(20)]
    samples = [next(one for one in several if bool(one.tracks) == tracked) for tracked in (True, False)]
    collate = SteadyCollator(Collator(model.backbone), packing=recipe.train.packing)
    batch = collate(samples)
    batch.pop("counts")
    return model, batch


@pytest.mark.parametrize("choice", CHOICES)
def test_it_trains(settings, choice):
    recipe = settings(**merged(CHOICES[choice], BF16, {"train": {"steps": 2}}))
    train(recipe)
    records = log_of(recipe.run.out)
    assert len(records) == 2
    for record in records:
        assert_finite(record)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_does_not_wait_within_a_step(settings, family, choice):
    if family != "qwen2_5_vl" and choice == "pairs of frames":
        pytest.skip("a family with one form of frames")
    loop, steps = loop_on(DEVICE, settings(family, **merged(CHOICES[choice], BF16)))
    loop.train_step(1, steps[0])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.train_step(2, steps[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")

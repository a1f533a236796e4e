"""A run takes the steps of a plain PyTorch loop, on one process and on two, and resumes exactly after a kill."""

import math
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.runs import (
    assert_ended,
    children_of,
    family_of,
    kill_at,
    launch,
    log_of,
    wait_for,
    weights_of,
    without_clock,
    write_config,
)
from support.tiny_training import backward_of_step

from gasp_fast.backbones.base import load_backbone
from gasp_fast.collator import Collator
from gasp_fast.supervision.head_files import read_heads
from gasp_fast.train import train
from gasp_fast.training.log import RunLog
from gasp_fast.training.loop import TrainingLoop
from gasp_fast.training.model import build_model
from gasp_fast.training.stream import SampleStream

REPOSITORY = Path(__file__).parents[2]


def plain_loop(config):
    """Loss and gradient norm of each step, by a plain loop that shares no code with the training loop."""
    model = build_model(config, torch.device("cpu")).train()
    heads = [p for name, p in model.named_parameters() if name.startswith("supervision.")]
    others = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("supervision.")]
    rate, steps = config.train.learning_rate, config.train.steps
    optimizer = torch.optim.AdamW([{"params": others}, {"params": heads}], lr=rate, weight_decay=0.0)
    stream, collate = SampleStream(config.data), Collator(load_backbone(config.model.source))
    warm = math.ceil(config.train.warmup * steps)
    expected = []
    for step in range(steps):
        ramp = step / max(1, warm) if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
        for group, scale in zip(optimizer.param_groups, (1.0, config.train.head_lr_scale), strict=True):
            group["lr"] = rate * scale * ramp
        start = step * config.train.batch_size
        loss = backward_of_step(model, [collate([stream[start + n]]) for n in range(config.train.batch_size)])
        for parameter in (*others, *heads):
            # A step in which a weight took no part here still updates its moments: it mostly took part on another rank.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((loss, norm.item()))
    return expected


def assert_same_steps(out, expected):
    records = log_of(out)
    assert [record["step"] for record in records] == list(range(1, len(expected) + 1))
    for record, (loss, norm) in zip(records, expected, strict=True):
        assert record["loss"] == pytest.approx(loss, rel=2e-5), (out, record["step"])
        assert record["grad_norm"] == pytest.approx(norm, rel=2e-3), (out, record["step"])


@pytest.mark.parametrize("mode", ["lora", "full", "heads"])
def test_one_process_takes_the_steps_of_a_plain_loop(config, family, mode):
    settings = config(family, mixed=True, train={"mode": mode, "steps": 4})
    expected = plain_loop(settings)
    train(settings)
    assert_same_steps(settings.run.out, expected)
    records = log_of(settings.run.out)
    assert any(record["lm"] is not None for record in records) and any(record["corr"] is not None for record in records)
    assert {len(record["pck_per_layer"]) for record in records} == {4}


def test_what_is_trained_is_fp32_whatever_the_model_computes_in(config):
    settings = config(model={"dtype": "bf16"}, train={"steps": 2, "checkpointing": "non_reentrant"})
    model = build_model(settings, torch.device("cpu"))
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    seen = []
    model.backbone.decoder_layers(model.model)[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    batch = Collator(model.backbone)([SampleStream(settings.data)[0]])
    model.train()(**batch)["loss"].backward()
    assert set(seen) == {torch.bfloat16}
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)
    train(settings)
    heads = read_heads(Path(settings.run.out) / "checkpoint-2" / "heads.safetensors")
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "checkpointing", "heads"),
    [("qwen2_5_vl", "non_reentrant", "fp32"), ("llava_next_video", "off", "fp32"), ("qwen2_5_vl", "off", "bf16")],
    indirect=["family"],
)
def test_two_processes_take_the_steps_of_a_plain_loop_under_every_zero_stage(
    config, family, tmp_path, checkpointing, heads
):
    """The stream alternates: at most steps one process has scenes and the other questions.

    The plain loop has no heads in bf16. Their coordinates are compared; all stages take the steps of the first.
    """
    precisions = {"compute": heads, "embeddings": heads}
    base = config(family, mixed=True, train={"steps": 4, "checkpointing": checkpointing}, heads=precisions)
    expected = plain_loop(replace(base, train=replace(base.train, checkpointing="off"))) if heads == "fp32" else None
    paths = []
    for name in ("ddp", "zero1", "zero2", "zero3"):
        preset = None if name == "ddp" else str(REPOSITORY / f"configs/deepspeed/{name}.json")
        run = replace(base.run, out=str(tmp_path / name))
        paths.append(write_config(replace(base, run=run, deepspeed=preset), tmp_path / f"{name}.yaml"))
    process = launch(1, Path(__file__).with_name("train_on_two_processes.py"), *paths)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output[-3000:]
    expected = expected or [(record["loss"], record["grad_norm"]) for record in log_of(tmp_path / "ddp")]
    for name in ("ddp", "zero1", "zero2", "zero3"):
        assert_same_steps(tmp_path / name, expected)
        heads = read_heads(tmp_path / name / "checkpoint-4" / "heads.safetensors")
        assert heads.layers == [0, 1, 2, 3] and all(p.any() for p in heads.parameters())


def test_the_numbers_of_a_step_are_read_when_the_next_one_is_launched(config, monkeypatch):
    """At the latest before a checkpoint. Those of the first step are read at once, for the time that it took."""
    events = []

    def record(owner, name, step_of):
        real = getattr(owner, name)

        def recorded(self, first, *others):
            events.append(f"{name} {step_of(first)}")
            return real(self, first, *others)

        monkeypatch.setattr(owner, name, recorded)

    record(TrainingLoop, "train_step", int)
    record(TrainingLoop, "save", int)
    record(RunLog, "write", lambda line: line["step"])
    train(config(train={"steps": 7}, run={"save_every": 5}))
    assert events == [
        "train_step 1", "write 1", "train_step 2", "train_step 3", "write 2", "train_step 4", "write 3",
        "train_step 5", "write 4", "write 5", "save 5", "train_step 6", "train_step 7", "write 6", "write 7", "save 7",
    ]  # fmt: skip


def test_a_line_counts_the_time_of_its_steps_and_not_that_of_reading_their_numbers(config, monkeypatch):
    """At a checkpoint the numbers of two steps are read together."""
    forward_backward = TrainingLoop.forward_backward

    def slowly(self, batch, share, last):
        time.sleep(0.1)
        forward_backward(self, batch, share, last)

    monkeypatch.setattr(TrainingLoop, "forward_backward", slowly)
    settings = config(train={"steps": 7, "batch_size": 2}, run={"save_every": 3})
    train(settings)
    tokens = [record["tokens_per_s"] for record in log_of(settings.run.out)]
    longest = Collator(load_backbone(settings.model.source))([SampleStream(settings.data)[n] for n in range(14)])
    assert max(tokens) < 2 * longest["input_ids"].shape[1] / 0.2


@pytest.mark.parametrize(
    ("train_with", "run_with", "logged"),
    [
        ({"mode": "lora"}, {"log_every": 1}, range(1, 8)),
        ({"mode": "full"}, {"log_every": 3, "save_async": True}, [1, 3, 6, 7]),
        ({"batch_size": 5, "tokens_at_once": 200}, {"log_every": 3}, [1, 3, 6, 7]),
        ({"batch_size": 5, "tokens_at_once": 400, "packing": True}, {"log_every": 3}, [1, 3, 6, 7]),
    ],
    ids=["lora", "full, saved in the background", "by tokens", "packed"],
)
def test_a_killed_run_resumes_with_the_same_log(config, tmp_path, train_with, run_with, logged):
    """Where `log_every` is 3, some log lines cover steps on both sides of a checkpoint."""
    run = {"save_every": 2, **run_with}
    whole = config(mixed=True, train={"steps": 7, **train_with}, run=run, lora={"dropout": 0.1})
    train(whole)
    assert [record["step"] for record in log_of(whole.run.out)] == list(logged)
    broken = replace(whole, run=replace(whole.run, out=str(tmp_path / "killed")))
    path = write_config(broken, tmp_path / "killed.yaml")
    process = launch(1, "-m", "gasp_fast.train", path)
    kill_at(process, broken.run.out, 3, 120)
    assert not (Path(broken.run.out) / "checkpoint-7").exists()
    train(broken)
    assert without_clock(log_of(broken.run.out)) == without_clock(log_of(whole.run.out))
    assert not list(Path(broken.run.out).glob(".*"))


def test_a_signal_ends_a_run_with_a_line_and_a_code_and_the_same_command_goes_on(config, tmp_path):
    whole = config(mixed=True, train={"steps": 9}, run={"log_every": 3}, lora={"dropout": 0.1})
    train(whole)
    broken = replace(whole, run=replace(whole.run, out=str(tmp_path / "broken")))
    process = launch(1, "-m", "gasp_fast.train", write_config(broken, tmp_path / "broken.yaml"))
    wait_for(process, broken.run.out, 3, 120)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=60)
    (saved,) = Path(broken.run.out).glob("checkpoint-*")
    step = int(saved.name.partition("-")[2])
    assert 3 <= step < 9 and process.returncode == 75
    assert output == f"gasp_fast.train: step {step}: SIGHUP; saved {saved}; continue with the same command\n"
    train(broken)
    assert without_clock(log_of(broken.run.out)) == without_clock(log_of(whole.run.out))
    assert weights_of(Path(broken.run.out) / "checkpoint-9") == weights_of(Path(whole.run.out) / "checkpoint-9")


def test_loader_workers_end_when_their_trainer_is_killed(config, tmp_path):
    settings = config(train={"steps": 500})
    settings = replace(settings, data=replace(settings.data, workers=2))
    path = write_config(settings, tmp_path / "c.yaml")
    process = launch(1, "-m", "gasp_fast.train", path)
    wait_for(process, settings.run.out, 3, 120)
    family = family_of(process)
    assert len(family) >= 4  # trainer, fork server, two workers
    process.kill()
    process.wait()
    assert_ended(family)


def test_a_finished_run_that_is_started_again_says_so_and_ends(config, tmp_path):
    """Its loader has workers, to which nothing has ever been sent."""
    settings = config(train={"steps": 2})
    train(settings)
    settings = replace(settings, data=replace(settings.data, workers=3))
    process = launch(1, "-m", "gasp_fast.train", write_config(settings, tmp_path / "c.yaml"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Traceback" not in output and "Exception" not in output, output


@pytest.mark.slow
def test_a_killed_run_under_zero2_resumes_with_the_same_log(config, tmp_path):
    preset = str(REPOSITORY / "configs/deepspeed/zero2.json")
    run = {"save_every": 2, "log_every": 3}
    base = config(mixed=True, train={"steps": 12}, run=run, loss={"learnable_temperature": True})
    runs = {name: replace(base, deepspeed=preset, run=replace(base.run, out=str(tmp_path / name))) for name in "ab"}
    paths = {name: write_config(run, tmp_path / f"{name}.yaml") for name, run in runs.items()}
    process = launch(2, "-m", "gasp_fast.train", paths["a"])
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]
    process = launch(2, "-m", "gasp_fast.train", paths["b"])
    kill_at(process, tmp_path / "b", 3, 200)
    assert not (tmp_path / "b" / "checkpoint-12").exists()
    process = launch(2, "-m", "gasp_fast.train", paths["b"])
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]
    assert without_clock(log_of(tmp_path / "b")) == without_clock(log_of(tmp_path / "a"))


@pytest.mark.slow
def test_a_run_under_zero2_stops_after_too_many_bad_steps(config, tmp_path):
    """The rate of step 2 makes the weights so large that the loss of step 3 is not finite."""
    preset = str(REPOSITORY / "configs/deepspeed/zero2.json")
    base = config(train={"steps": 6, "learning_rate": 1e30}, run={"bad_steps": 1})
    process = launch(1, "-m", "gasp_fast.train", write_config(replace(base, deepspeed=preset), tmp_path / "z.yaml"))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1, output[-3000:]
    assert "step 3: the gradient is not finite (scenes[" in output
    assert "step 4: the gradient is not finite (scenes[" in output.splitlines()[-1] and "2 such steps" in output
    assert [record["step"] for record in log_of(base.run.out)] == [1, 2, 3]


@pytest.mark.slow
def test_a_frozen_rank_ends_the_run_after_a_set_time(config, tmp_path):
    base = config(train={"steps": 500}, run={"save_every": 1000, "timeout": 8.0})
    process = launch(
        1, "-m", "gasp_fast.training.launch", "--standalone", "--nproc-per-node", 2, "--shutdown-timeout", 3,
        "-m", "gasp_fast.train", write_config(base, tmp_path / "f.yaml"),
    )  # fmt: skip
    wait_for(process, base.run.out, 2, 200)
    family = family_of(process)
    os.kill(children_of(process)[-1], signal.SIGSTOP)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in output, output
    assert "process 0 lost another, which ended or froze: " in output
    assert_ended(family)


@pytest.mark.slow
def test_the_death_of_a_rank_ends_the_run_within_a_minute(config, tmp_path):
    base = config(train={"steps": 500}, run={"save_every": 1000})
    process = launch(2, "-m", "gasp_fast.train", write_config(base, tmp_path / "c.yaml"), start_new_session=True)
    log = Path(base.run.out) / "log.jsonl"
    end = time.monotonic() + 200
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    os.kill(children_of(process)[-1], signal.SIGKILL)
    start = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - start < 60


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["run.max_skipped=0"]], ids=["to its end", "until an error"])
def test_the_threads_of_the_process_group_end_before_the_interpreter_does(config, assets, tmp_path, overrides):
    """Otherwise they run while it is torn down, which can abort the process."""
    questions = tmp_path / "questions"
    shutil.copytree(assets.questions, questions)
    for video in sorted(questions.rglob("*.mp4"))[1:]:
        video.write_bytes(b"")
    settings = config(mixed=True, qa={"root": str(questions)}, run={"max_skipped": 1.0})
    path = write_config(settings, tmp_path / "c.yaml")
    process = launch(2, Path(__file__).with_name("threads_after_a_run.py"), path, *overrides)
    output, _ = process.communicate(timeout=200)
    assert (process.returncode == 0) == (not overrides), output[-3000:]
    assert [line for line in output.splitlines() if line.startswith("left:")] == ["left:", "left:"]

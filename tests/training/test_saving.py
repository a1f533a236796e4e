"""Checkpoints that are written while training goes on are those of a run that waits for them."""

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.runs import launch, log_of, weights_of, without_clock, write_config

from gasp_fast.train import train
from gasp_fast.training.guards import GuardError
from gasp_fast.training.loop import TrainingLoop
from gasp_fast.training.state import Snapshot

REPOSITORY = Path(__file__).parents[2]


def in_background(settings, folder):
    return replace(settings, run=replace(settings.run, out=str(folder), save_async=True))


def after(monkeypatch, wait):
    """Let the checkpoints be written only when `wait` returns."""
    write = Snapshot.write

    def late(self, *arguments):
        wait()
        write(self, *arguments)

    monkeypatch.setattr(Snapshot, "write", late)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_they_hold_the_state_of_their_step_however_late_they_are_written(config, tmp_path, monkeypatch, mode):
    settings = config(mixed=True, train={"steps": 5, "mode": mode}, run={"save_every": 2, "keep": 9})
    train(settings)
    after(monkeypatch, lambda: time.sleep(1))
    later = in_background(settings, tmp_path / "later")
    train(later)
    for step in (2, 4, 5):
        name = f"checkpoint-{step}"
        assert weights_of(Path(settings.run.out) / name) == weights_of(tmp_path / "later" / name), step
    shutil.rmtree(tmp_path / "later" / "checkpoint-5")
    train(later)  # from 4
    assert without_clock(log_of(later.run.out)) == without_clock(log_of(settings.run.out))


def test_training_goes_on_while_one_is_written_and_the_next_one_waits_for_it(config, tmp_path, monkeypatch):
    launched, waited = threading.Event(), []
    step_of = TrainingLoop.train_step

    def train_step(self, step, micro_batches):
        if step == 4:
            launched.set()
        return step_of(self, step, micro_batches)

    monkeypatch.setattr(TrainingLoop, "train_step", train_step)
    after(monkeypatch, lambda: waited.append(launched.wait(60)))
    settings = in_background(config(train={"steps": 5}, run={"save_every": 2}), tmp_path / "run")
    train(settings)
    assert waited == [True, True, True]  # the first one, of step 2, was written after step 4 had begun
    assert sorted(path.name for path in Path(settings.run.out).glob("*checkpoint-*")) == [
        "checkpoint-2", "checkpoint-4", "checkpoint-5",
    ]  # fmt: skip


def test_a_disk_that_is_full_ends_the_run_after_one_of_the_next_steps(config, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gasp_fast.training.state.write_state", full)
    settings = in_background(config(train={"steps": 500}, run={"save_every": 12}), tmp_path / "run")
    with pytest.raises(OSError, match=r"checkpoint-12 cannot be written: .*No space left on device"):
        train(settings)
    assert log_of(settings.run.out)[-1]["step"] < 24
    assert not list(Path(settings.run.out).glob("*checkpoint-*"))


@pytest.mark.parametrize("save_async", [False, True])
def test_a_disk_that_is_nearly_full_ends_the_run_with_what_it_has_trained(config, monkeypatch, save_async):
    """However long it is until the next checkpoint."""
    settings = config(train={"steps": 40}, run={"save_every": 1000, "save_async": save_async})
    usage, step_of = shutil.disk_usage, TrainingLoop.train_step

    def train_step(self, step, micro_batches):
        if step == 3:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=4e9))
        return step_of(self, step, micro_batches)

    monkeypatch.setattr(TrainingLoop, "train_step", train_step)
    with pytest.raises(GuardError, match=r"only 4.0 GB are free .*checkpoint-\d is complete, and the same command"):
        train(settings)
    (saved,) = Path(settings.run.out).glob("*checkpoint-*")
    assert saved.name == f"checkpoint-{log_of(settings.run.out)[-1]['step']}" and saved.name <= "checkpoint-5"
    monkeypatch.undo()
    train(settings)
    assert [record["step"] for record in log_of(settings.run.out)] == list(range(1, 41))


def test_training_goes_on_when_the_disk_has_space_again(config, monkeypatch):
    settings = config(train={"steps": 6}, run={"save_every": 1000})
    usage, low = shutil.disk_usage, iter([False, False, True, *[False] * 50])  # at the start, and in two steps

    def judged(path):
        return usage(path)._replace(free=4e9) if next(low) else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", judged)
    train(settings)
    assert log_of(settings.run.out)[-1]["step"] == 6
    assert len(list(Path(settings.run.out).glob("checkpoint-*"))) == 2


def test_an_error_waits_for_the_checkpoint_that_is_being_written(config, tmp_path, monkeypatch):
    """Otherwise the lock of the folder would be free while the thread writes into it."""
    after(monkeypatch, lambda: time.sleep(2))

    def spoiled(self, step):
        raise ValueError("spoiled")

    monkeypatch.setattr(TrainingLoop, "check_learning", lambda self, step: step == 3 and spoiled(self, step))
    settings = in_background(config(train={"steps": 5}, run={"save_every": 2}), tmp_path / "run")
    with pytest.raises(ValueError, match="spoiled"):
        train(settings)
    assert [path.name for path in Path(settings.run.out).glob("*checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.slow
@pytest.mark.parametrize("save_async", [False, True])
def test_two_processes_end_with_one_line_if_a_checkpoint_cannot_be_written(config, tmp_path, save_async):
    settings = config(train={"steps": 500}, run={"save_every": 12, "save_async": save_async})
    out = Path(settings.run.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / ".checkpoint-12.partial").touch()  # where the first one would be written
    process = launch(2, "-m", "gasp_fast.train", write_config(settings, tmp_path / "c.yaml"))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    line = f"gasp_fast.train: {out / 'checkpoint-12'} cannot be written: "
    assert 1 <= sum(text.startswith(line) for text in output.splitlines()) <= 2, output[-2000:]
    assert "lost another" not in output
    assert log_of(out)[-1]["step"] < 24


@pytest.mark.slow
def test_under_zero_they_hold_the_state_of_their_step(config, tmp_path):
    base = config(mixed=True, train={"steps": 5}, run={"save_every": 2, "keep": 9}, lora={"dropout": 0.1})
    paths, names = [], ("ddp", "zero2", "zero3")
    for name in names:
        preset = None if name == "ddp" else str(REPOSITORY / f"configs/deepspeed/{name}.json")
        plain = replace(base, deepspeed=preset, run=replace(base.run, out=str(tmp_path / name)))
        for number, settings in enumerate((plain, in_background(plain, tmp_path / f"{name}-later"))):
            paths.append(write_config(settings, tmp_path / f"{name}-{number}.yaml"))
    process = launch(1, Path(__file__).with_name("train_on_two_processes.py"), *paths)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    for name in names:
        for step in (2, 4, 5):
            checkpoints = [tmp_path / folder / f"checkpoint-{step}" for folder in (name, f"{name}-later")]
            assert weights_of(checkpoints[0]) == weights_of(checkpoints[1]), (name, step)

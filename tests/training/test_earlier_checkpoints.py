"""Checkpoints of earlier versions resume exactly, and nothing that their files name is called."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.earlier_checkpoints import save_as_earlier
from support.runs import log_of, run_to_end, tensors_of, without_clock

from gasp_fast.config.loader import to_yaml
from gasp_fast.train import main, train
from gasp_fast.training.loop import TrainingLoop

REPOSITORY = Path(__file__).parents[2]


def weights_of(folder):
    tensors = tensors_of(folder, "[amh]*.safetensors")  # adapters, model, heads
    return {name: (value.dtype, value.numpy().tobytes()) for name, value in tensors.items()}


@pytest.fixture
def earlier(config, tmp_path, capsys, monkeypatch):
    """An earlier version's run of 4 steps that stopped at 2. Returns its last folder, and what continues it."""
    settings = config(train={"steps": 4}, run={"save_every": 2})
    with monkeypatch.context() as patched:
        patched.setattr(TrainingLoop, "save", save_as_earlier)
        train(settings)
    out = Path(settings.run.out)
    shutil.rmtree(out / "checkpoint-4")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings))
    capsys.readouterr()

    def again(*overrides):
        status = main([str(path), *overrides])
        return status, capsys.readouterr().err.strip()

    return out / "checkpoint-2", again


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_run_that_an_earlier_version_saved_resumes_exactly(config, tmp_path, monkeypatch, mode):
    settings = config(mixed=True, train={"mode": mode, "steps": 4}, run={"save_every": 2}, lora={"dropout": 0.1})
    whole, out = replace(settings, run=replace(settings.run, out=str(tmp_path / "whole"))), Path(settings.run.out)
    train(whole)
    with monkeypatch.context() as patched:
        patched.setattr(TrainingLoop, "save", save_as_earlier)
        train(settings)
    shutil.rmtree(out / "checkpoint-4")
    train(settings)
    assert without_clock(log_of(out)) == without_clock(log_of(whole.run.out))
    assert weights_of(out / "checkpoint-4") == weights_of(tmp_path / "whole" / "checkpoint-4")
    assert (out / "checkpoint-4" / "optimizer-1.safetensors").is_file()  # saved as this version does


def test_a_changed_learning_rate_holds_also_after_an_earlier_version(earlier):
    folder, again = earlier
    assert again("train.learning_rate=2e-3", "run.allow_changes=[train]")[0] == 0
    rates = [line["lr"] for line in without_clock(log_of(folder.parent))]
    assert rates[2] == pytest.approx(2 * 0.75e-3)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "heads.safetensors"])
def test_a_missing_state_is_an_error(earlier, name):
    folder, again = earlier
    (folder / name).unlink()
    status, printed = again()
    assert status == 1 and f"{folder}/{name} is missing" in printed.splitlines()[-1]


def test_a_parameter_without_moments_is_an_error(earlier):
    folder, again = earlier
    stored = torch.load(folder / "optimizer.pt", weights_only=True)
    del stored["state"][5]
    torch.save(stored, folder / "optimizer.pt")
    status, printed = again()
    assert status == 1 and "exp_avg of parameter 5 is missing" in printed.splitlines()[-1]


def test_a_renamed_value_of_the_schedule_is_an_error(earlier):
    folder, again = earlier
    stored = torch.load(folder / "scheduler.pt", weights_only=True)
    stored["epoch"] = stored.pop("last_epoch")
    torch.save(stored, folder / "scheduler.pt")
    status, printed = again()
    assert status == 1 and "scheduler.pt" in printed.splitlines()[-1] and "last_epoch" in printed.splitlines()[-1]


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_nothing_that_a_file_names_is_called(earlier, tmp_path, monkeypatch, name):
    folder, again = earlier
    monkeypatch.chdir(tmp_path)
    torch.save(Payload(), folder / name)
    status, printed = again()
    assert status == 1 and f"{folder}/{name}" in printed and "more than tensors" in printed.splitlines()[-1]
    (folder / name).write_bytes(pickle.dumps(Payload()))
    assert again()[0] == 1
    assert not Path("executed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_run_under_zero_that_an_earlier_version_saved_resumes_exactly_and_runs_none_of_its_code(
    config, tmp_path, stage
):
    settings = config(train={"steps": 4}, run={"save_every": 2})
    settings = replace(settings, deepspeed=str(REPOSITORY / f"configs/deepspeed/{stage}.json"))
    path, out = tmp_path / "config.yaml", Path(settings.run.out)
    path.write_text(to_yaml(settings))

    def run(script="train_on_two_processes.py"):
        done = run_to_end(1, Path(__file__).with_name(script), path, cwd=tmp_path)
        return done.returncode, done.stderr

    status, printed = run("save_as_earlier_on_two_processes.py")
    assert status == 0, printed[-3000:]
    whole, weights, folder = without_clock(log_of(out)), weights_of(out / "checkpoint-4"), out / "checkpoint-2"
    shutil.rmtree(out / "checkpoint-4")
    status, printed = run()
    assert status == 0, printed[-3000:]
    assert without_clock(log_of(out)) == whole and weights_of(out / "checkpoint-4") == weights
    shutil.rmtree(out / "checkpoint-4")
    states = [path for path in (folder / "global_step2").iterdir() if "optim" in path.name]
    assert len(states) == 2
    torch.save(Payload(), states[1])
    status, printed = run()
    assert status != 0 and f"{folder}/global_step2 does not fit this run or is damaged" in printed
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match=r"was written with ranks = 2, this run has 1"):
        train(replace(settings, deepspeed=None))

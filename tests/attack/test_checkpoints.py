"""Tampered checkpoints change no run: they are refused in one line, or the run goes on from an intact one, by name."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.damaged_scenes import damage_bytes, damage_json, replace_file
from support.runs import weights_of
from support.tiny_training import *  # noqa: F403 (fixtures)

from gasp_fast.config.loader import to_yaml
from gasp_fast.evaluation.evaluated_model import load_evaluated_model
from gasp_fast.export import find_checkpoint
from gasp_fast.manifest import MANIFEST
from gasp_fast.train import main, train
from gasp_fast.training.checkpoints import to_resume
from gasp_fast.training.distributed import start_processes

TRIES = 20  # of each file
RUNS = 12  # that are resumed


def cut(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def rename(path: Path, draw: random.Random) -> None:
    path.rename(path.with_name(f"x{path.name}"))


def add(path: Path, draw: random.Random) -> None:
    path.with_name("model-00001-of-00002.safetensors").write_bytes(path.read_bytes())


def rename_tensor(path: Path, draw: random.Random) -> None:
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    tensors[f"{name}.x"] = tensors.pop(name)
    save_file(tensors, path, {"format": "pt"})


def swap_tensors(path: Path, draw: random.Random) -> None:
    """Two tensors of one shape change names: nothing but a checksum can see it."""
    tensors = load_file(path)
    one = draw.choice(sorted(tensors))
    same = [name for name in sorted(tensors) if name != one and tensors[name].shape == tensors[one].shape]
    other = draw.choice(same)
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()
    save_file(tensors, path, {"format": "pt"})


def ways_for(path: Path) -> list[Callable[[Path, random.Random], object]]:
    ways: list[Callable[[Path, random.Random], object]] = [cut, flip, flip, remove, rename, add, damage_bytes]
    ways.append(replace_file)
    if path.suffix == ".safetensors":
        ways += [rename_tensor, *([swap_tensors] if len(load_file(path)) > 1 else [])]
    return ways


@pytest.fixture
def finished(config, tmp_path):
    """A run of 3 steps with a checkpoint at each, and the file of its configuration."""
    settings = config(train={"steps": 3}, run={"save_every": 1})
    train(settings)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings))
    return Path(settings.run.out), path


def one_line(error: Exception, folder: Path) -> str | None:
    text = str(error)
    return None if "\n" not in text and str(folder) in text and len(text) < 1000 else text[:300]


def test_damage_to_any_file_is_noticed_before_it_is_used(finished, tmp_path, capsys) -> None:
    out, _ = finished
    processes = start_processes()
    whole = shutil.move(out, tmp_path / "whole")
    files = sorted(path.name for path in (whole / "checkpoint-3").iterdir())
    failures, tries, unverified = [], 0, 0
    for name in files:
        draw = random.Random(name)
        for number in range(TRIES):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(whole, out)
            newest = out / "checkpoint-3"
            path = newest / name
            before = path.read_bytes()
            way = draw.choice(ways_for(path))
            how, tries = f"{name} {number} {way.__name__} {way(path, draw) or ''}", tries + 1
            if path.is_file() and not path.is_symlink() and path.read_bytes() == before and way is not add:
                continue
            if (chosen := to_resume(out, "auto", processes)) != out / "checkpoint-2":
                failures.append(f"{how}: auto resumes {chosen}")
            if str(newest) not in capsys.readouterr().err:
                failures.append(f"{how}: not named")
            if not (newest / MANIFEST).exists() and not (newest / MANIFEST).is_symlink():
                unverified += 1  # used if it is named, as those of earlier versions; all other files are whole
                continue
            resumed = (to_resume, (out, str(newest), processes))
            for use, arguments in (resumed, (find_checkpoint, (out,)), (load_evaluated_model, (newest,))):
                try:
                    use(*arguments)
                    failures.append(f"{how}: used by {use.__name__}")
                except (ValueError, OSError) as error:
                    if (problem := one_line(error, newest)) is not None:
                        failures.append(f"{how}: {problem}")
    with capsys.disabled():
        print(f" {len(files)} files: {tries} tries, {len(failures)} failures, {unverified} without a manifest")
    assert not failures, "\n".join(failures)
    assert unverified < TRIES


def test_runs_with_a_tampered_newest_checkpoint_end_as_if_nothing_had_happened(finished, tmp_path, capsys) -> None:
    out, path = finished
    whole = shutil.copytree(out, tmp_path / "whole")

    def result() -> tuple[list[float], dict[str, object]]:
        losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
        return losses, weights_of(out / "checkpoint-3")

    expected, draw, failures = result(), random.Random(0), []
    names = sorted(file.name for file in (whole / "checkpoint-3").iterdir() if file.name != MANIFEST)
    for number in range(RUNS):
        shutil.rmtree(out)
        shutil.copytree(whole, out)
        file = out / "checkpoint-3" / names[number % len(names)]
        way = draw.choice([way for way in ways_for(file) if way not in (damage_bytes, replace_file)])
        way(file, draw)
        capsys.readouterr()
        status, how = main([str(path)]), f"{file.name} {way.__name__}"
        if "checkpoint-3 is damaged" not in capsys.readouterr().err:
            failures.append(f"{how}: not named")
        if status != 0 or result() != expected:
            failures.append(f"{how}: status {status}, or another result")
    with capsys.disabled():
        print(f" resumed: {RUNS} tries, {len(failures)} failures")
    assert not failures, "\n".join(failures)


def test_odd_json_without_a_manifest_is_one_line_or_changes_nothing(finished, tmp_path, capsys) -> None:
    out, _ = finished
    processes = start_processes()
    folder, draw, failures, refused = out / "checkpoint-3", random.Random(1), [], 0
    (folder / MANIFEST).unlink()
    text = (folder / "about.json").read_text()
    for number in range(100):
        (folder / "about.json").unlink(missing_ok=True)
        (folder / "about.json").write_text(text)
        how = damage_json(folder / "about.json", draw)
        try:
            to_resume(out, str(folder), processes)
        except (ValueError, OSError) as error:
            refused += 1
            if (problem := one_line(error, folder)) is not None:
                failures.append(f"{number} {how}: {problem}")
    with capsys.disabled():
        print(f" about.json: 100 tries, {len(failures)} failures, {refused} refused")
    assert not failures and refused > 30, "\n".join(failures)

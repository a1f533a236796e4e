"""`run.json` records what ran, each time that a run is started."""

import json
import shutil
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import torch
from support.runs import launch, write_config
from training.test_stream import SEQUENCES, annotated

from gasp_fast.processes import processor_name
from gasp_fast.run_folder import STARTS
from gasp_fast.train import main, train
from gasp_fast.training.starts import commit_of
from gasp_fast.training.stream import SampleStream


def starts_of(settings):
    return json.loads((Path(settings.run.out) / STARTS).read_text())["starts"]


def test_each_start_of_a_run_is_recorded_without_the_environment(config, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "never-to-be-written")
    settings = config(mixed=True, train={"steps": 2, "seed": 7}, run={"save_every": 1})
    path = write_config(settings, tmp_path / "config.yaml")
    assert main([str(path)]) == 0
    shutil.rmtree(Path(settings.run.out) / "checkpoint-2")
    assert main([str(path)]) == 0
    first, second = starts_of(settings)
    assert (first["resumed_from"], second["resumed_from"]) == (None, "checkpoint-1")
    assert datetime.fromisoformat(first["time"]) <= datetime.fromisoformat(second["time"])
    assert "python" in first["command"]
    assert first["versions"]["torch"] == torch.__version__ and first["versions"]["gasp-fast"] == "0.1.0"
    assert {"python", "transformers", "peft", "deepspeed", "triton"} <= first["versions"].keys()
    assert (first["processes"], first["zero_stage"]) == (1, 0)
    assert first["machines"] == [{"gpu": None, "processor": processor_name(), "processes": 1}]
    seeds = ("data.seed", "data.collator.seed", "data.scenes.sequences.seed", "data.qa.seed", "data.vqa.seed")
    assert first["seeds"] == {"train.seed": 7, **dict.fromkeys(seeds, 0)}
    assert first["data"].keys() == {"scenes", "qa"} and first["data"] == second["data"]
    assert "never-to-be-written" not in (Path(settings.run.out) / STARTS).read_text()


def test_a_damaged_record_does_not_end_a_run(config):
    settings = config(train={"steps": 1})
    path = Path(settings.run.out) / STARTS
    for text in ("{", "[]", '{"starts": 3}', "[" * 100_000):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        train(settings)
        assert len(starts_of(settings)) == 1


@pytest.mark.slow
def test_the_machines_of_all_processes_are_recorded(config, tmp_path):
    settings = config(train={"steps": 1})
    process = launch(2, "-m", "gasp_fast.train", write_config(settings, tmp_path / "c.yaml"))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]
    (start,) = starts_of(settings)
    assert start["processes"] == 2 and start["machines"][0]["processes"] == 2
    assert start["command"].endswith(f"-m gasp_fast.train {tmp_path / 'c.yaml'}")


def test_other_data_has_another_fingerprint(config, assets, tmp_path):
    library, questions = tmp_path / "library", tmp_path / "questions"
    shutil.copytree(assets.scenes, library)
    shutil.copytree(assets.questions, questions)
    tracks = annotated(assets, tmp_path / "tracks", 4)
    ready = {"root": str(library), "annotations": (tracks,), "sequences": SEQUENCES}

    def fingerprints():
        on_the_fly = config(mixed=True, scenes={"root": str(library)}, qa={"root": str(questions)}).data
        sources = [
            *SampleStream(on_the_fly).sources.values(),
            *SampleStream(config(scenes=ready).data).sources.values(),
        ]
        return [source.fingerprint() for source in sources]

    def changed(change):
        before = fingerprints()
        change()
        return [one != other for one, other in zip(before, fingerprints(), strict=True)]

    def rename_a_frame():
        for folder in ("color", "depth", "pose"):
            first = sorted((library / "scene-1" / folder).iterdir())[0]
            first.rename(first.with_stem(f"{first.stem}x"))

    def change_an_answer():
        records = json.loads((questions / "qa.json").read_text())
        records[2]["conversations"][1]["value"] += "!"
        (questions / "qa.json").write_text(json.dumps(records))

    def damage_a_shard():
        shard = Path(tracks) / "tracks-00001.safetensors"
        shard.write_bytes(shard.read_bytes()[:100])

    assert changed(lambda: None) == [False, False, False]
    assert changed(rename_a_frame) == [True, False, False]
    assert changed(change_an_answer) == [False, True, False]
    damage_a_shard()
    with pytest.raises(OSError, match="shard 1 of 4 is damaged"):
        fingerprints()


def test_the_commit_is_that_of_a_package_that_runs_from_a_checkout(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert commit_of(package) is None  # it lies in a checkout that it does not belong to
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "m"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert commit_of(package) == {"id": head, "modified": False}
    (package / "__init__.py").write_text("1")
    assert commit_of(package) == {"id": head, "modified": True}

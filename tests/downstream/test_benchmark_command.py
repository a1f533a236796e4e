"""`gasp-fast benchmark` before lmms-eval starts: what is missing is one line that says what to do."""

import json
import shutil
import sys

import pytest

from gasp_fast.cli import main
from gasp_fast.downstream import answers, data, environment
from gasp_fast.downstream.suites import BENCHMARKS


def model(folder, kind="qwen2_5_vl", **report):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    (folder / "model.safetensors").touch()
    if report:
        (folder / "gasp_export.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def failure(tmp_path, capsys, monkeypatch):
    """Runs the command with a model and a folder of data in which VSI-Bench is; returns its one line."""
    monkeypatch.delenv(environment.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "model")
    for folder in ("nyu-visionx/VSI-Bench", "vsibench"):
        (tmp_path / "data" / folder).mkdir(parents=True)

    def run(*words, suite="vsibench"):
        words = ["--model", "model", "--data", "data", "--out", "out", "--suite", suite, *words]
        assert main(["benchmark", *map(str, words)]) == 1
        return capsys.readouterr().err.strip()

    return run


def test_without_lmms_eval_one_line_has_the_command_that_makes_its_environment(failure):
    assert failure() == (
        "gasp-fast benchmark: no lmms-eval in .venv-eval; make its environment with: python3 -m venv .venv-eval && "
        ".venv-eval/bin/pip install lmms-eval==0.7.3 decord qwen-vl-utils 'transformers>=5.17,<6' 'filelock<4'"
    )


def test_an_environment_without_lmms_eval_or_with_another_version_is_refused(failure, tmp_path, monkeypatch):
    (tmp_path / "other" / "bin").mkdir(parents=True)
    python = tmp_path / "other" / "bin" / "python"
    python.symlink_to(sys.executable)
    assert "no lmms-eval in other; make its environment with: " in failure("--environment", "other")
    python.unlink()
    python.write_text("#!/bin/sh\necho 0.6.0\n")
    python.chmod(0o755)
    monkeypatch.setenv(environment.VARIABLE, "other")  # the option comes before the variable, which is used here
    assert "other has lmms-eval 0.6.0, but tasks and scores here are those of 0.7.3" in failure()


def test_missing_data_are_one_line_for_each_benchmark_that_says_where_to_put_them(failure, tmp_path):
    lines = failure(suite="videomme,cv_bench").splitlines()
    assert lines[0] == (
        "videomme: no data; put a copy of the dataset lmms-eval/Video-MME into data/lmms-eval/Video-MME "
        "(hf download --repo-type dataset lmms-eval/Video-MME --local-dir data/lmms-eval/Video-MME)"
    )
    assert lines[1].startswith("cv_bench: no data; put a copy of the dataset nyu-visionx/CV-Bench into ")
    assert lines[2] == "gasp-fast benchmark: no data for --suite videomme,cv_bench in data"
    shutil.rmtree(tmp_path / "data" / "vsibench")
    assert failure().splitlines()[0] == (
        "vsibench: no videos; put the archives of nyu-visionx/VSI-Bench into data/nyu-visionx/VSI-Bench, "
        "or unpack them into data/vsibench"
    )
    (tmp_path / "data" / "nyu-visionx" / "VSI-Bench" / "scannet.zip").touch()  # lmms-eval unpacks it
    assert "no lmms-eval in .venv-eval" in failure()


def test_wrong_models_and_settings_are_refused(failure, tmp_path):
    assert "--base data: no model (config.json, *.safetensors)" in failure("--base", "data")
    model(tmp_path / "llava", "llava_next_video")
    assert "--base llava: a llava_next_video, but the model is a qwen2_5_vl" in failure("--base", "llava")
    model(tmp_path / "gemma", "gemma3")
    assert "model_type gemma3; benchmarks run for qwen2_5_vl, llava_next_video" in failure("--base", "gemma")
    assert "--frames 1: at least 2" in failure("--frames", "1")
    assert "--data nowhere: no such folder" in failure("--data", "nowhere")


def test_the_base_is_the_one_that_the_export_names_if_it_is_here(tmp_path, capsys):
    base = model(tmp_path / "base")
    export = model(tmp_path / "export", base=str(base))
    assert answers.subjects(export, None)["base"].folder == base
    assert answers.subjects(export, model(tmp_path / "other"))["base"].folder == tmp_path / "other"
    away = model(tmp_path / "away", base="Qwen/Qwen2.5-VL-7B-Instruct")
    assert "base" not in answers.subjects(away, None) and "give --base DIR" in capsys.readouterr().out


def test_other_settings_or_weights_are_answered_again(tmp_path):
    who = answers.subject("model", model(tmp_path / "model"))
    first = who.identity()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"new")
    assert who.identity() != first
    settings = answers.Settings(frames=8)
    assert settings.of(BENCHMARKS["vsibench"], "qwen2_5_vl") == {"frames": 8, "pixels": 451_584}
    assert settings.of(BENCHMARKS["blink"], "qwen2_5_vl") == {"frames": None, "pixels": 1_605_632}
    assert settings.of(BENCHMARKS["vsibench"], "llava_next_video") == {"frames": 8, "pixels": None}


def test_the_reason_of_a_stop_is_the_last_error_without_progress_bars(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "start\nFileExistsError: video path:/a.mp4 does not exist.\n\rModel Responding:  50%|###   | 1/2\nexiting\n"
    )
    assert answers.reason(log) == "FileExistsError: video path:/a.mp4 does not exist."
    log.write_text("video path:/b.mp4 does not exist, please check\n")  # of sys.exit
    assert answers.reason(log) == "video path:/b.mp4 does not exist, please check"


def test_a_dataset_that_lmms_eval_has_prepared_before_is_there(tmp_path):
    (tmp_path / "datasets" / "nyu-visionx___cv-bench").mkdir(parents=True)
    assert data.missing(tmp_path, BENCHMARKS["cv_bench"]) is None
    assert "no data" in str(data.missing(tmp_path, BENCHMARKS["blink"]))

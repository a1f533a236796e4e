"""A checkpoint is used only if every file is as it was saved; a damaged one is named and the one before it is used."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runs import log_of, run_to_end, without_clock

from gasp_fast.config.loader import to_yaml
from gasp_fast.evaluation.evaluated_model import load_evaluated_model
from gasp_fast.export import export
from gasp_fast.manifest import MANIFEST, damage, write_manifest
from gasp_fast.train import main, train
from gasp_fast.training import checkpoints

REPOSITORY = Path(__file__).parents[2]
LAYER = "layers.2.self_attn.v_proj"


@pytest.fixture
def resume(config, tmp_path, capsys):
    """Train 3 steps with a checkpoint at each. Returns the run's folder, and what continues it to step 4."""
    settings = config(train={"steps": 3}, run={"save_every": 1})
    train(settings)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings))
    capsys.readouterr()

    def again(*overrides):
        status = main([str(path), "train.steps=4", "run.allow_changes=[train.steps]", *overrides])
        return status, capsys.readouterr().err.strip()

    return Path(settings.run.out), again


@pytest.fixture
def newest(resume):
    """The newest checkpoint, without the manifest that would show its damage. A run uses it if it is named."""
    out, _ = resume
    (out / "checkpoint-3" / MANIFEST).unlink()
    return out / "checkpoint-3"


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_every_file_is_in_the_manifest_with_its_size(resume):
    out, _ = resume
    folder = out / "checkpoint-3"
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert (
        listed.keys() == {path.name for path in folder.iterdir()} - {MANIFEST} and "optimizer-1.safetensors" in listed
    )
    assert all(listed[name]["bytes"] == (folder / name).stat().st_size for name in listed)
    assert damage(folder) is None


def test_files_of_a_checkpoint_have_the_usual_permissions(config):
    settings = config(train={"steps": 1})
    before = os.umask(0o027)
    try:
        train(settings)
    finally:
        os.umask(before)
    files = (Path(settings.run.out) / "checkpoint-1").iterdir()
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}


def test_files_in_subfolders_are_in_the_manifest(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"ab")
    write_manifest(tmp_path)
    (tmp_path / "inner" / "a").write_bytes(b"ac")
    assert damage(tmp_path) == "inner/a has other content than was saved"


def test_auto_names_the_damaged_checkpoint_and_continues_from_the_one_before(resume):
    out, again = resume
    whole = without_clock(log_of(out))
    (out / "checkpoint-3" / "random.safetensors").unlink()
    status, printed = again("train.steps=3")
    assert status == 0 and f"{out}/checkpoint-3 is damaged: random.safetensors is missing" in printed
    assert without_clock(log_of(out)) == whole  # step 3 was taken again, from checkpoint-2
    assert damage(out / "checkpoint-3") is None


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(resume):
    out, again = resume
    for folder in out.glob("checkpoint-*"):
        (folder / "foreign.bin").write_bytes(b"x")
    status, printed = again()
    assert status == 1 and "all checkpoints are damaged (checkpoint-1: foreign.bin was not saved with it)" in printed


def test_a_named_damaged_checkpoint_is_one_error(resume):
    out, again = resume
    path = out / "checkpoint-2" / "heads.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    status, printed = again(f"run.resume={path.parent}")
    assert status == 1 and "checkpoint-2 is damaged: heads.safetensors has" in printed and "\n" not in printed
    assert again()[0] == 0


def test_a_damaged_checkpoint_is_neither_exported_nor_evaluated(resume, tmp_path):
    out, _ = resume
    path = out / "checkpoint-3" / "adapter_model.safetensors"
    edit_tensors(path, lambda tensors: tensors[min(tensors)].add_(1))
    for source in (out, out / "checkpoint-3"):
        with pytest.raises(ValueError, match=r"checkpoint-3 is damaged: adapter_model\.safetensors has other content"):
            export(source, tmp_path / "plain")
        with pytest.raises(ValueError, match=r"checkpoint-3 is damaged"):
            load_evaluated_model(source)
    assert export(out / "checkpoint-2", tmp_path / "plain").checkpoint == "checkpoint-2"


def test_a_damaged_checkpoint_of_a_fully_trained_model_is_not_evaluated(config):
    settings = config(train={"mode": "full", "steps": 1})
    train(settings)
    folder = Path(settings.run.out) / "checkpoint-1"
    load_evaluated_model(folder)
    (folder / "generation_config.json").unlink()
    with pytest.raises(ValueError, match=r"generation_config\.json is missing"):
        load_evaluated_model(folder)


def test_a_checkpoint_that_lost_its_manifest_is_not_used_unasked(resume, newest):
    status, printed = resume[1]()
    assert status == 0 and f"{newest} is damaged: manifest.json is missing; looking for an older one" in printed


def test_a_checkpoint_without_a_manifest_is_used_with_a_note(resume, newest):
    status, printed = resume[1](f"run.resume={newest}")
    note = f"{newest} has no manifest.json, as those of earlier versions: its files are not verified"
    assert status == 0 and printed.splitlines()[0] == note


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[" * 100_000, '{"step": "3"}', '{"step": 1e400}'],
    ids=["empty", "list", "nothing", "deep", "text", "infinite"],
)
def test_odd_json_in_about_is_one_line(resume, newest, text):
    (newest / "about.json").write_text(text)
    status, printed = resume[1](f"run.resume={newest}")
    assert status == 1 and f"{newest}/about.json" in printed.splitlines()[-1]


def test_sums_of_another_shape_in_about_are_one_line(resume, newest):
    path = newest / "about.json"
    for sums in ([], [[1.0]], [["a"]], [[1.0], 2]):
        path.write_text(json.dumps({**json.loads(path.read_text()), "unlogged": sums}))
        status, printed = resume[1](f"run.resume={newest}")
        assert status == 1 and "unlogged" in printed.splitlines()[-1]


@pytest.mark.parametrize("name", ["optimizer-1.safetensors", "random.safetensors", "heads.safetensors"])
def test_a_missing_state_is_an_error_also_without_a_manifest(resume, newest, name):
    (newest / name).unlink()
    status, printed = resume[1](f"run.resume={newest}")
    assert status == 1 and f"{newest}/{name} is missing" in printed.splitlines()[-1]


@pytest.mark.parametrize("name", ["optimizer-1.safetensors", "random.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x02" + bytes(7) + b"{}"])
def test_a_state_that_is_no_safetensors_file_is_a_line(resume, newest, name, content):
    (newest / name).write_bytes(content)
    status, printed = resume[1](f"run.resume={newest}")
    assert status == 1 and f"{newest}/{name} does not fit this run or is damaged" in printed.splitlines()[-1]


def lose(tensors, part):
    for name in [name for name in tensors if part in name]:
        del tensors[name]


def rename(tensors, part):
    name = min(name for name in tensors if part in name)
    tensors[name.replace(part, part.replace("2", "3") + "x")] = tensors.pop(name)


def reshape(tensors, part):
    name = min(name for name in tensors if part in name)
    tensors[name] = tensors[name][:1].clone()


@pytest.mark.parametrize("change", [lose, rename, reshape])
def test_adapters_that_differ_from_the_model_are_errors_in_every_use(resume, newest, tmp_path, change):
    edit_tensors(newest / "adapter_model.safetensors", lambda tensors: change(tensors, LAYER))
    status, printed = resume[1](f"run.resume={newest}")
    assert status == 1 and str(newest) in printed.splitlines()[-1] and LAYER in printed.splitlines()[-1]
    with pytest.raises(ValueError, match=str(newest)):
        export(newest, tmp_path / "plain")
    with pytest.raises(ValueError, match=str(newest)):
        load_evaluated_model(newest)
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("change", [lose, rename, reshape])
def test_heads_that_differ_from_the_model_are_errors(resume, newest, change):
    edit_tensors(newest / "heads.safetensors", lambda tensors: change(tensors, "by_layer.2.first"))
    status, printed = resume[1](f"run.resume={newest}")
    assert status == 1 and f"{newest}/heads.safetensors" in printed.splitlines()[-1]
    with pytest.raises(ValueError, match=r"heads\.safetensors"):
        load_evaluated_model(newest)


@pytest.mark.parametrize("change", [lose, rename, reshape])
def test_a_base_model_that_lacks_weights_is_not_trained(config, tmp_path, capsys, change):
    settings = config()
    folder = shutil.copytree(settings.model.source, tmp_path / "base")
    edit_tensors(folder / "model.safetensors", lambda tensors: change(tensors, "layers.2.mlp"))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(replace(settings, model=replace(settings.model, source=str(folder)))))
    assert main([str(path)]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(folder) in last and "layers.2.mlp" in last


@pytest.mark.parametrize("change", [lose, rename, reshape])
def test_a_fully_trained_model_that_lacks_weights_does_not_resume(config, change):
    settings = config(train={"mode": "full", "steps": 2}, run={"save_every": 1})
    train(settings)
    folder = Path(settings.run.out) / "checkpoint-1"
    (folder / MANIFEST).unlink()
    edit_tensors(folder / "model-00001-of-00001.safetensors", lambda tensors: change(tensors, "layers.2.mlp"))
    with pytest.raises(ValueError, match=str(folder)):
        train(replace(settings, run=replace(settings.run, resume=str(folder))))


def test_a_run_killed_while_a_damaged_checkpoint_is_replaced_goes_on(resume, monkeypatch):
    """Nothing half removed is left under a checkpoint's name."""
    out, again = resume
    (out / "checkpoint-3" / "random.safetensors").unlink()
    remove = shutil.rmtree

    def killed(folder, **options):
        if any(path.name == "manifest.json" for path in folder.iterdir()) and "checkpoint-3" in folder.name:
            (folder / "manifest.json").unlink()
            raise KeyboardInterrupt
        remove(folder, **options)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            again("train.steps=3")
    assert not (out / "checkpoint-3").exists() or damage(out / "checkpoint-3") is None
    status, printed = again("train.steps=3")
    assert status == 0, printed
    assert damage(out / "checkpoint-3") is None


def test_what_a_killed_run_left_is_removed_before_disk_space_is_judged(resume, monkeypatch):
    out, again = resume
    left = out / ".checkpoint-9.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    seen, usage = [], shutil.disk_usage

    def judged(path):
        seen.append(left.exists())
        return usage(path)

    monkeypatch.setattr(shutil, "disk_usage", judged)
    assert again()[0] == 0
    assert seen and not any(seen)


@pytest.mark.parametrize(
    ("change", "expected"),
    [(lose, "exp_avg is missing"), (rename, "exp_avg is missing"), (reshape, "has the shape")],
)
def test_moments_that_differ_from_the_model_are_errors(resume, newest, change, expected):
    edit_tensors(
        newest / "optimizer-1.safetensors", lambda tensors: change(tensors, f"{LAYER}.lora_B.default.weight.exp_avg")
    )
    status, printed = resume[1](f"run.resume={newest}")
    last = printed.splitlines()[-1]
    assert status == 1 and f"{newest}/optimizer-1.safetensors" in last and LAYER in last and expected in last


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_missing_optimiser_state_is_an_error_and_does_not_begin_anew(config, mode):
    settings = config(train={"steps": 2, "mode": mode})
    train(settings)
    folder = Path(settings.run.out) / "checkpoint-2"
    (folder / MANIFEST).unlink()
    gone = []

    def lose_all_of_one(tensors):
        gone.append(next(name.rpartition(".")[0] for name in sorted(tensors) if "q_proj" in name))
        for part in ("exp_avg", "exp_avg_sq", "step"):
            del tensors[f"{gone[0]}.{part}"]

    edit_tensors(folder / "optimizer-1.safetensors", lose_all_of_one)
    assert json.loads((folder / "about.json").read_text())["without_state"] == []
    changed = replace(settings, run=replace(settings.run, resume=str(folder)))
    with pytest.raises(ValueError, match=rf"optimizer-1\.safetensors does not fit .*{gone[0]}\.exp_avg is missing"):
        train(changed)


def test_a_parameter_that_no_step_has_used_resumes_without_a_state(config):
    settings = config(train={"steps": 1, "mode": "full"})
    train(settings)
    folder = Path(settings.run.out) / "checkpoint-1"
    (folder / MANIFEST).unlink()

    def lose(tensors):
        for name in [name for name in tensors if name.startswith("model.lm_head.weight.")]:
            del tensors[name]

    edit_tensors(folder / "optimizer-1.safetensors", lose)
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps({**about, "without_state": ["model.lm_head.weight"]}))
    path = Path(settings.run.out) / "again.yaml"
    path.write_text(to_yaml(settings))
    assert main([str(path), "train.steps=2", "run.allow_changes=[train.steps]", f"run.resume={folder}"]) == 0
    whole = load_file(Path(settings.run.out) / "checkpoint-2" / "optimizer-1.safetensors")
    assert int(whole["model.lm_head.weight.step"]) == 1  # begun anew
    assert {int(value) for name, value in whole.items() if name.endswith(".step")} == {1, 2}


def test_heads_that_do_not_fit_are_named_by_their_tensor(resume, newest):
    edit_tensors(newest / "heads.safetensors", lambda tensors: tensors.pop("by_layer.1.first.weight"))
    status, printed = resume[1](f"run.resume={newest}")
    last = printed.splitlines()[-1]
    assert status == 1 and f"{newest}/heads.safetensors" in last and "by_layer.1.head.first.weight" in last


def test_a_checkpoint_that_lacks_heads_is_not_evaluated(newest):
    file = newest / "heads.safetensors"
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if ".2." not in name}, file, {"compute": '"fp32"'})
    with pytest.raises(ValueError, match=r"heads\.safetensors has no head of layer 3, .*heads\.layers = 'all'; get"):
        load_evaluated_model(newest)
    file.unlink()
    with pytest.raises(OSError, match=r"heads\.safetensors is missing, .*heads\.layers = 'all'; get"):
        load_evaluated_model(newest)


def test_moments_of_a_weight_that_is_not_trained_are_an_error(resume, newest):
    def add(tensors):
        for part in ("exp_avg", "exp_avg_sq", "step"):
            tensors[f"model.other.{part}"] = torch.zeros(())

    edit_tensors(newest / "optimizer-1.safetensors", add)
    status, printed = resume[1](f"run.resume={newest}")
    assert status == 1 and "it holds a state of model.other, which is not trained" in printed.splitlines()[-1]


def test_a_run_is_not_overwritten_by_the_continuation_of_another_one(resume, config, tmp_path):
    out, again = resume
    other = config(train={"steps": 2}, run={"out": str(tmp_path / "other"), "save_every": 1})
    train(other)
    log = (out / "log.jsonl").read_text()
    status, printed = again(f"run.resume={other.run.out}/checkpoint-1")
    assert status == 1 and "is of another run, and run.out" in printed and "\n" not in printed
    assert (out / "log.jsonl").read_text() == log and damage(out / "checkpoint-3") is None
    assert again(f"run.resume={other.run.out}/checkpoint-1", f"run.out={tmp_path / 'new'}", "train.steps=2")[0] == 0


@pytest.mark.slow
def test_several_processes_agree_on_the_checkpoint(config, tmp_path):
    settings = config(train={"steps": 3}, run={"save_every": 1})
    path, out = tmp_path / "config.yaml", Path(settings.run.out)
    path.write_text(to_yaml(replace(settings, deepspeed=str(REPOSITORY / "configs/deepspeed/zero2.json"))))

    def run(*overrides):
        done = run_to_end(2, "-m", "gasp_fast.train", path, *overrides, cwd=tmp_path)
        return done.returncode, done.stderr

    status, printed = run()
    assert status == 0, printed[-3000:]
    whole, file = without_clock(log_of(out)), out / "checkpoint-3" / "optimizer-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    status, printed = run()
    assert status == 0, printed[-3000:]
    assert printed.count(f"{out}/checkpoint-3 is damaged: {file.name} has") == 1
    assert without_clock(log_of(out)) == whole
    (out / "checkpoint-3" / MANIFEST).unlink()
    file.unlink()
    status, printed = run("train.steps=4", "run.allow_changes=[train.steps]", f"run.resume={file.parent}")
    assert status != 0 and f"{file} is missing" in printed

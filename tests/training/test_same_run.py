"""A run that resumes is the same run: what differs is refused by name, or allowed by name and then in effect."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gasp_fast.backbones.fingerprint import fingerprint
from gasp_fast.config.loader import keys_of, load_config, to_yaml
from gasp_fast.data.synthetic.scenes import SyntheticConfig, make_scene, write_scene
from gasp_fast.evaluation.evaluated_model import load_evaluated_model
from gasp_fast.export import export
from gasp_fast.manifest import MANIFEST
from gasp_fast.run_folder import base_of
from gasp_fast.train import main, train
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.gasp import RULES


@pytest.fixture(scope="module")
def folder_of_run(tmp_path_factory):
    return tmp_path_factory.mktemp("stopped")


@pytest.fixture
def run(config, folder_of_run, tmp_path, capsys):
    """A run of 4 steps that stopped at 2. Returns its folder, and what continues it with overrides.

    It is trained once. Each test gets a copy in the same folder, whose name is part of the run's configuration.
    """
    out, kept = folder_of_run / "run", folder_of_run / "kept"
    settings = config(mixed=True, train={"steps": 4, "warmup": 0.5}, run={"save_every": 2, "out": str(out)})
    if not kept.exists():
        train(settings)
        shutil.rmtree(out / "checkpoint-4")
        shutil.copytree(out, kept, symlinks=True)
    shutil.rmtree(out)
    shutil.copytree(kept, out, symlinks=True)
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(settings))
    capsys.readouterr()

    def again(*overrides):
        status = main([str(path), *overrides])
        return status, capsys.readouterr().err.strip()

    return out, again


def rates(out):
    return [json.loads(line)["lr"] for line in (out / "log.jsonl").read_text().splitlines()]


def configs(out):
    return {path.name: path.read_text() for path in out.glob("config*.yaml")}


def altered(source, folder, change):
    """A copy of a model in which `change` has altered the tensors."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def shifted(tensors):
    for name in tensors:
        tensors[name] = tensors[name] + 0.25


# ---- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "refused"),
    [
        ("train.learning_rate=2e-3", "train.learning_rate = 0.001, now 0.002"),
        ("train.head_lr_scale=1", "train.head_lr_scale = 4.0, now 1.0"),
        ("train.warmup=0.25", "train.warmup = 0.5, now 0.25"),
        ("train.steps=3", "train.steps = 4, now 3"),
        ("train.clip=2", "train.clip = 1.0, now 2.0"),
        ("train.weight_decay=0.1", "train.weight_decay = 0.0, now 0.1"),
        ("lora.dropout=0.1", "lora.dropout = 0.0, now 0.1"),
        ("lora.alpha=16", "lora.alpha = null, now 16"),
        ("loss.negatives=frame", "loss.negatives = 'sequence', now 'frame'"),
        ("loss.other_targets=ignored", "loss.other_targets = 'negatives', now 'ignored'"),
        ("loss.average=track", "loss.average = 'sequence', now 'track'"),
        ("loss.layer_reduction=sum", "loss.layer_reduction = 'mean', now 'sum'"),
        ("heads.input=output_normed", "heads.input = 'output', now 'output_normed'"),
        ("data.collator.keep=0.5", "data.collator.keep = 1.0, now 0.5"),
        ("data.scenes.order=chronological", "data.scenes.order = 'anchor_first', now 'chronological'"),
        ("loss.temperature=0.1", "loss.temperature = 0.07, now 0.1"),
        ("loss.lm_weight=0.5", "loss.lm_weight = 1.0, now 0.5"),
        ("heads.compute=bf16", "heads.compute = 'fp32', now 'bf16'"),
        ("model.dtype=bf16", "model.dtype = 'fp32', now 'bf16'"),
        ("data.seed=1", "data.seed = 0, now 1"),
        ("data.qa.frames=3", "data.qa.frames = 2, now 3"),
        ("data.qa.limit=5", "data.qa.limit = null, now 5"),
        ("data.qa.seed=1", "data.qa.seed = 0, now 1"),
        ("data.scenes.only_counted=true", "data.scenes.only_counted = False, now True"),
        ("data.scenes.weight=2", "data.scenes.weight = 1.0, now 2.0"),
        ("data.scenes.sequences.seed=1", "data.scenes.sequences.seed = 0, now 1"),
        ("data.collator.anchors=first", "data.collator.anchors = 'all', now 'first'"),
    ],
)
def test_a_change_of_what_is_computed_is_refused_with_the_key_that_allows_it(run, override, refused):
    out, again = run
    before = configs(out)
    status, printed = again(override)
    key = override.partition("=")[0]
    assert status == 1 and "\n" not in printed
    assert f"{out}/checkpoint-2 was written by another run: {refused}: " in printed
    assert f"run.allow_changes=[{key}] lets that change from step 2 on" in printed
    assert configs(out) == before and not (out / "checkpoint-4").exists()


@pytest.mark.parametrize(
    "override",
    [
        "train.mode=full", "train.batch_size=4", "train.seed=1", "lora.rank=8", "heads.layers=2-3", "heads.mid_size=8",
        "heads.out_size=8", "heads.init=random", "heads.bias=zero", "loss.learnable_temperature=true",
    ],
)  # fmt: skip
def test_what_cannot_change_is_refused_with_the_reason_even_if_it_is_allowed(run, override):
    _, again = run
    key = override.partition("=")[0]
    status, printed = again(override, f"run.allow_changes=[{key}]")
    assert status == 1 and f"{key} = " in printed and f"({RULES.fixed[key]})" in printed
    assert "restore what it was, or give another run.out to begin anew" in printed and "lets that" not in printed


def test_every_changed_key_is_named_in_one_line(run):
    _, again = run
    status, printed = again("train.learning_rate=1", "lora.rank=8", "loss.eps=1", "run.allow_changes=[loss]")
    assert status == 1 and "\n" not in printed
    assert "lora.rank = 4, now 8" in printed and "train.learning_rate = 0.001, now 1.0" in printed
    assert "loss.eps" not in printed  # it is allowed
    assert "run.allow_changes=[train.learning_rate] lets" in printed


def test_the_start_value_of_a_learned_temperature_cannot_change(config):
    loss = {"learnable_temperature": True}
    train(config(train={"steps": 2}, loss=loss))
    changed = config(train={"steps": 2}, loss={**loss, "temperature": 0.1}, run={"allow_changes": ("loss",)})
    with pytest.raises(ValueError, match=r"loss\.temperature = 0\.07, now 0\.1 \(it acts at the beginning"):
        train(changed)


def test_a_key_that_does_not_exist_cannot_be_allowed(run):
    _, again = run
    status, printed = again("run.allow_changes=[learning_rate]")
    assert status == 1 and "run.allow_changes names 'learning_rate', which is no key" in printed


def test_every_key_that_is_excepted_exists():
    assert {*RULES.free, *RULES.rounding, *RULES.fixed} <= set(keys_of(TrainConfig))


# ---- the base model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", ["", "run.allow_changes=[model]"])
def test_adapters_are_never_continued_on_another_base_model(run, assets, tmp_path, allowed):
    out, again = run
    other = altered(assets.models["qwen2_5_vl"], tmp_path / "other", shifted)
    status, printed = again(f"model.source={other}", *filter(None, [allowed]))
    assert status == 1 and "model.source = a model of other weights, now" in printed and str(other) in printed
    assert base_of(out / "checkpoint-2") == str(assets.models["qwen2_5_vl"])


def test_a_base_model_that_changed_in_its_place_is_refused_in_every_use(config, assets, tmp_path):
    place = altered(assets.models["qwen2_5_vl"], tmp_path / "place", lambda tensors: None)
    settings = config(train={"steps": 1}, model={"source": str(place)})
    train(settings)
    folder = Path(settings.run.out) / "checkpoint-1"
    shutil.rmtree(place)
    altered(assets.models["qwen2_5_vl"], place, shifted)
    with pytest.raises(ValueError, match=r"model\.source = a model of other weights"):
        train(settings)
    message = r"trained on other weights than .*; name the right base model with --base"
    for base in (None, str(place)):
        with pytest.raises(ValueError, match=message):
            export(folder, tmp_path / "plain", base=base)
        with pytest.raises(ValueError, match=message):
            load_evaluated_model(folder, base=base)
    load_evaluated_model(folder, base=str(assets.models["qwen2_5_vl"]))


def test_a_base_model_may_move(run, assets, tmp_path):
    out, again = run
    moved = shutil.copytree(assets.models["qwen2_5_vl"], tmp_path / "moved")
    status, printed = again(f"model.source={moved}")
    assert status == 0, printed
    assert base_of(out / "checkpoint-2") == str(assets.models["qwen2_5_vl"])
    assert base_of(out / "checkpoint-4") == str(moved)


def test_another_processor_is_another_model(run, assets, tmp_path):
    _, again = run
    other = shutil.copytree(assets.models["qwen2_5_vl"], tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    status, printed = again(f"model.source={other}")
    assert status == 1 and "model.source = a model of other processor" in printed
    assert again(f"model.source={other}", "run.allow_changes=[model.source]")[0] == 0


def test_a_fingerprint_is_that_of_the_weights_not_of_the_files(assets, tmp_path):
    from safetensors.torch import save_file

    source = assets.models["qwen2_5_vl"]
    whole = fingerprint(str(source))
    divided = shutil.copytree(source, tmp_path / "divided")
    tensors = load_file(divided / "model.safetensors")
    (divided / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for name, part in files.items():
        save_file({key: tensors[key] for key in part}, divided / name)
    weight_map = {key: name for name, part in files.items() for key in part}
    (divided / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert fingerprint(str(divided)) == whole

    def one_layer(tensors):
        name = next(name for name in tensors if "layers.2.self_attn.q_proj.weight" in name)
        tensors[name] = tensors[name] + torch.rand_like(tensors[name])

    other = fingerprint(str(altered(source, tmp_path / "other", one_layer)))
    assert other["weights"] != whole["weights"] and other["config"] == whole["config"]
    assert fingerprint("some/hub-model-that-is-not-here") is None


def test_a_damaged_model_has_no_fingerprint_but_a_line(assets, tmp_path):
    for number, text in enumerate(
        (b"", b"\xff" * 8, b"\x10" + bytes(7) + b'{"a": [1, 2, 3]}', b"\x02" + bytes(7) + b"[]")
    ):
        broken = shutil.copytree(assets.models["qwen2_5_vl"], tmp_path / str(number))
        (broken / "model.safetensors").write_bytes(text)
        with pytest.raises(OSError, match=r"model = '.*' cannot be loaded") as caught:
            fingerprint(str(broken))
        assert "\n" not in str(caught.value)


# ---- allowed ------------------------------------------------------------------------------------------------------


def test_what_changes_no_result_may_change(run, tmp_path):
    out, again = run
    status, printed = again(
        "run.progress=false", "run.log_every=2", "run.save_every=3", "run.keep=5", "run.timeout=100", "data.workers=1",
        "data.qa.timeout=60", "run.bad_steps=9",
    )  # fmt: skip
    assert status == 0 and "another run" not in printed and "from step" not in printed
    assert (out / "checkpoint-4").is_dir()


def test_other_kernels_are_allowed_with_a_line(run):
    _, again = run
    packed = "train.packing=true", "train.tokens_at_once=300"
    status, printed = again("loss.backend=torch", "train.checkpointing=full", *packed)
    assert status == 0
    (line,) = [line for line in printed.splitlines() if "agree to rounding" in line]
    assert "loss.backend = 'auto', now 'torch'; train.checkpointing = 'off', now 'full'; " in line
    assert "train.packing = False, now True; train.tokens_at_once = null, now 300: the same sums" in line


def test_an_allowed_learning_rate_holds_from_the_next_step_on(run):
    out, again = run
    assert rates(out) == [0.0, 5e-4, 1e-3, 5e-4]
    status, printed = again("train.learning_rate=2e-3", "run.allow_changes=[train.learning_rate]")
    assert status == 0
    assert "gasp_fast.train: from step 2 on: train.learning_rate = 0.001, now 0.002" in printed
    assert "step 2: the learning rate goes from 0.001 to 0.002" in printed
    assert rates(out) == [0.0, 5e-4, 2e-3, 1e-3]


def test_an_allowed_number_of_steps_holds_from_the_next_step_on(run):
    out, again = run
    status, printed = again("train.steps=6", "run.allow_changes=[train.steps]", "train.warmup=0.5")
    assert status == 0 and "train.steps = 4, now 6" in printed
    assert "step 2: the learning rate goes from 0.001 to 0.000667" in printed
    assert rates(out) == pytest.approx([0.0, 5e-4, 2e-3 / 3, 1e-3, 7.5e-4, 2.5e-4])


def test_a_run_is_made_longer_and_its_learning_rate_does_not_jump(run):
    """After the warm-up of 2 steps, 8 steps instead of 4; at 5 of them it stops once more, and then takes 11."""
    out, again = run
    status, printed = again("train.steps=8", "run.save_every=5")
    assert status == 0 and "the learning rate goes" not in printed
    line = "from step 2 on: train.steps = 4, now 8 (the learning rate comes down from 0.001 in step 2 to 0 in step 8; "
    assert f"{line}run.allow_changes=[train.steps] would take that of a run of 8 steps)" in printed
    cosine = [1e-3 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(7)]
    assert rates(out) == pytest.approx([0.0, 5e-4, *cosine[:6]])
    shutil.rmtree(out / "checkpoint-8")
    assert again("train.steps=8", "run.save_every=5")[0] == 0  # the same run, as it was made longer
    assert rates(out) == pytest.approx([0.0, 5e-4, *cosine[:6]])
    shutil.rmtree(out / "checkpoint-8")
    assert again("train.steps=11")[0] == 0
    last = [cosine[3] * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert rates(out) == pytest.approx([0.0, 5e-4, *cosine[:3], *last])


def test_a_run_that_is_made_longer_in_its_warmup_completes_the_warmup(config, capsys):
    settings = config(train={"steps": 4, "warmup": 0.75}, run={"save_every": 1, "keep": 9})
    train(settings)
    for step in (2, 3, 4):
        shutil.rmtree(Path(settings.run.out) / f"checkpoint-{step}")
    train(replace(settings, train=replace(settings.train, steps=5)))
    assert rates(Path(settings.run.out)) == pytest.approx([0.0, 1e-3 / 3, 2e-3 / 3, 1e-3, 5e-4])


def test_a_run_whose_learning_rate_is_zero_is_not_made_longer_unasked(run):
    out, again = run
    assert again()[0] == 0
    status, printed = again("train.steps=6")
    assert status == 1 and "train.steps = 4, now 6 (the learning rate has come down to 0 in step 4): " in printed
    assert "run.allow_changes=[train.steps] lets that change from step 4 on" in printed
    assert again("train.steps=6", "run.allow_changes=[train.steps]", "run.save_every=5")[0] == 0
    assert rates(out)[4:] == pytest.approx([7.5e-4, 2.5e-4])
    shutil.rmtree(out / "checkpoint-6")
    assert again("train.steps=6")[0] == 0  # the same run
    assert rates(out)[4:] == pytest.approx([7.5e-4, 2.5e-4])


def test_epochs_that_give_the_same_steps_are_no_change(run):
    _, again = run
    status, printed = again("train.steps=null", "train.epochs=0.008")  # of 1,000 positions, by 2
    assert status == 0 and "from step" not in printed, printed


def test_weight_decay_that_is_allowed_is_applied(run, tmp_path):
    """Head biases and other vectors are not decayed; matrices shrink."""
    out, again = run
    whole = shutil.copytree(out, tmp_path / "whole", symlinks=True)
    assert again()[0] == 0
    plain = load_file(out / "checkpoint-4" / "heads.safetensors")
    shutil.rmtree(out)
    shutil.copytree(whole, out, symlinks=True)
    assert again("train.weight_decay=1", "run.allow_changes=[train.weight_decay]")[0] == 0
    decayed = load_file(out / "checkpoint-4" / "heads.safetensors")
    name = min(name for name in plain if name.endswith("weight"))
    assert decayed[name].norm() < plain[name].norm()


def rewrite_questions(root):
    (file,) = root.rglob("*.json")
    file.write_text(file.read_text().replace("?", "??"))


def permute_poses(root):
    for folder in root.rglob("pose"):
        files = sorted(folder.iterdir())
        texts = [file.read_text() for file in files]
        for file, text in zip(files, texts[1:] + texts[:1], strict=True):
            file.write_text(text)


@pytest.mark.parametrize(("source", "change"), [("qa", rewrite_questions), ("scenes", permute_poses)])
def test_other_data_in_the_same_place_is_noticed(config, assets, tmp_path, source, change):
    """As much of it, with the same settings."""
    root = shutil.copytree({"qa": assets.questions, "scenes": assets.scenes}[source], tmp_path / "data")
    settings = config(mixed=True, **{source: {"root": str(root)}}, train={"steps": 2}, run={"save_every": 1})
    train(settings)
    train(settings)
    change(root)
    with pytest.raises(
        ValueError,
        match=rf"data\.{source} = \d+ samples, now as many, but other ones: .*allow_changes=\[data\.{source}\]",
    ):
        train(settings)
    train(replace(settings, run=replace(settings.run, allow_changes=(f"data.{source}",))))


def test_more_data_in_the_same_place_is_noticed(config, assets, tmp_path):
    scenes = shutil.copytree(assets.scenes, tmp_path / "scenes")
    settings = config(scenes={"root": str(scenes)}, train={"steps": 2}, run={"save_every": 1})
    train(settings)
    write_scene(make_scene(9, SyntheticConfig(frames=10, width=96, height=80, samples=1)), scenes / "scene-9")
    with pytest.raises(
        ValueError, match=r"data\.scenes = 16 samples, now 20 samples: .*allow_changes=\[data\.scenes\]"
    ):
        train(settings)
    train(replace(settings, run=replace(settings.run, allow_changes=("data.scenes",))))


# ---- what is written ----------------------------------------------------------------------------------------------


def test_the_first_configuration_stays_and_later_ones_are_numbered(run):
    out, again = run
    first = configs(out)
    assert again()[0] == 0 and configs(out) == first
    assert again("run.log_every=2")[0] == 0
    assert again("run.log_every=2")[0] == 0
    assert again("run.log_every=3")[0] == 0
    now = configs(out)
    assert (
        now.keys() == {"config.yaml", "config-2.yaml", "config-3.yaml"} and now["config.yaml"] == first["config.yaml"]
    )
    assert [yaml.safe_load(now[name])["run"]["log_every"] for name in sorted(now, reverse=True)] == [1, 3, 2]
    assert load_config(TrainConfig, out / "config-3.yaml").run.log_every == 3


def test_a_checkpoint_holds_the_configuration_it_was_written_with(run):
    out, again = run
    assert again("train.clip=2", "run.allow_changes=[train]")[0] == 0
    clips = [load_config(TrainConfig, out / f"checkpoint-{n}" / "config.yaml").train.clip for n in (2, 4)]
    assert clips == [1.0, 2.0]
    status, printed = again("train.clip=1")
    assert status == 1 and "train.clip = 2.0, now 1.0" in printed  # it is the newer one that is continued


def test_a_run_that_never_saved_begins_anew_with_another_configuration(run):
    out, again = run
    shutil.rmtree(out / "checkpoint-2")
    (out / "training.png").unlink()
    (out / "config-2.yaml").write_text("run: {}")
    assert again("train.clip=2")[0] == 0
    assert configs(out).keys() == {"config.yaml"}
    assert load_config(TrainConfig, out / "config.yaml").train.clip == 2


def test_a_finished_run_whose_checkpoints_are_gone_is_not_overwritten(run):
    out, again = run
    shutil.rmtree(out / "checkpoint-2")
    before = configs(out)
    for resume in ("auto", "never"):
        status, printed = again(f"run.resume={resume}")
        assert status == 1 and "holds a finished run without its checkpoints; give another run.out" in printed
    assert configs(out) == before and (out / "log.jsonl").read_text().count("\n") == 4


# ---- checkpoints of earlier versions ------------------------------------------------------------------------------


@pytest.fixture
def earlier(run):
    """The run as an earlier version would have written it."""
    out, again = run
    folder = out / "checkpoint-2"
    for name in (MANIFEST, "config.yaml"):
        (folder / name).unlink()
    facts = json.loads((folder / "about.json").read_text())
    kept = {name: facts[name] for name in facts if name not in ("steps", "samples", "data", "base")}
    (folder / "about.json").write_text(json.dumps(kept))
    return out, lambda *overrides: again(f"run.resume={folder}", *overrides)


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["train.learning_rate=1"], "train.learning_rate = 0.001, now 1.0"),
        (["train.steps=8"], "train.steps = 4, now 8"),
        (["train.batch_size=4"], "train.batch_size = 2, now 4"),
        (["model.source=OTHER"], "model.source = '"),
    ],
)
def test_an_earlier_checkpoint_is_compared_with_the_configuration_of_its_run(
    earlier, assets, tmp_path, overrides, refused
):
    _, again = earlier
    other = str(altered(assets.models["qwen2_5_vl"], tmp_path / "other", shifted))
    status, printed = again(*[override.replace("OTHER", other) for override in overrides])
    assert status == 1 and refused in printed
    assert again()[0] == 0


def test_a_key_that_the_earlier_version_had_not_has_its_default(earlier):
    out, again = earlier
    tree = yaml.safe_load((out / "config.yaml").read_text())
    del tree["loss"]["other_targets"]
    (out / "config.yaml").write_text(yaml.safe_dump(tree))
    status, printed = again("loss.other_targets=ignored")
    assert status == 1 and "loss.other_targets = 'negatives', now 'ignored'" in printed
    assert again()[0] == 0


def test_without_any_configuration_the_checkpoint_itself_is_compared(earlier):
    out, again = earlier
    (out / "config.yaml").unlink()
    status, printed = again("train.batch_size=4")
    assert status == 1 and "train.batch_size = 2, now 4" in printed
    assert again()[0] == 0


@pytest.mark.parametrize("text", ["[", "a: &a [*a", "\x00", "x" * 10])
def test_a_configuration_that_cannot_be_read_is_a_line(earlier, text):
    out, again = earlier
    (out / "checkpoint-2" / "config.yaml").write_text(text)
    status, printed = again()
    assert status in (0, 1) and "Traceback" not in printed
    assert status == 0 or "checkpoint-2/config.yaml: not YAML" in printed.splitlines()[-1]

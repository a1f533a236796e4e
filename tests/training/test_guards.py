"""A run that cannot succeed stops early, with one line that names the cause and the cure."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import launch, write_config

from gasp_fast.config.loader import to_yaml
from gasp_fast.run_folder import checkpoint_folders
from gasp_fast.train import main, train
from gasp_fast.training import guards
from gasp_fast.training.distributed import fill_deepspeed, read_deepspeed
from gasp_fast.training.gasp import Gasp
from gasp_fast.training.model import SupervisedModel, build_model
from gasp_fast.training.optim import trained_groups
from gasp_fast.training.sources import QAConfig
from gasp_fast.training.stream import DataConfig, SampleStream, Share

CPU = torch.device("cpu")


@pytest.fixture
def run_main(config, tmp_path, capsys):
    """Run the command with overrides. Returns its exit status and what it printed on stderr."""

    def run(*overrides):
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml(config()))
        status = main([str(path), *overrides])
        return status, capsys.readouterr().err.strip()

    return run


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.source=./nowhere"], "there is no such folder"),
        (["data.scenes.root=nowhere"], "nowhere: no such folder"),
        (["run.resume=nowhere/checkpoint-3"], "run.resume = 'nowhere/checkpoint-3': no such folder"),
        (["run.min_free_gb=1e9"], "run.min_free_gb = 1e+09, but only"),
        (["deepspeed=nowhere.json"], "deepspeed = 'nowhere.json' cannot be read"),
        (["heads.layers=3-9"], "layers = '3-9' does not fit a model of 4 layers"),
        (["model.attention=flash_attention_2"], "use model.attention=auto"),
        (["train.batch_size=3", "train.micro_batch_size=2"], "use a multiple of 2"),
        (["train.tokens_at_once=0"], "train.tokens_at_once = 0 must be at least 1"),
        (
            ["train.tokens_at_once=4096", "train.micro_batch_size=1"],
            "train.tokens_at_once = 4096 and train.micro_batch_size = 1 both say how much is computed at once; set one "
            "of them to null",
        ),
        (["train.packing=true"], "train.packing = true packs nothing with train.micro_batch_size = 1"),
        (["loss.average=token"], "loss.average = 'token' must be one of 'sequence', 'anchor', 'track', 'match'"),
        (["train.learning_rat=1"], "the nearest is train.learning_rate"),
        (["train.lr=0.1"], "the nearest is train.learning_rate"),
        (["model.liger=true"], "needs a GPU, and this is cpu; train on one, or use model.liger=auto"),
        (["data.qa.root=nowhere"], "nowhere: no such folder"),
        (["run.report_to=[notebook]"], "run.report_to = 'notebook' is not known; choose among tensorboard, wandb"),
        (["data.scenes.grids=[]"], "data.scenes.grids = [] must name at least one grid"),
        (["data.scenes.grids=[8, 0]"], "data.scenes.grids = [8, 0] must name at least one grid, each of 1 to 1024"),
        (["data.scenes.keep=0"], "data.scenes.keep = 0.0 is a share"),
        (["data.scenes.held_out=1.5"], "data.scenes.held_out = 1.5 is a share"),
        (["data.scenes.weight=0"], "data.scenes.weight = 0 leaves no source to train on"),
        (["data.scenes.weight=-1"], "data.scenes.weight = -1.0 must be finite and 0 or more"),
        (["data.vqa.weight=.inf"], "data.vqa.weight = inf must be finite"),
        (["data.scenes.only_counted=true"], "data.scenes.only_counted = true leaves no source to train on; give one"),
        (["data.scenes.only_counted=true", "data.scenes.weight=0"], "only_counted = true has no scenes to count; give"),
        (["data.qa.limit=0"], "data.qa: limit = 0 must be at least 1"),
        (["data.qa.frames=0"], "data.qa: frames = 0 must be at least 1"),
        (["data.qa.timeout=-1"], "data.qa: timeout = -1.0 must be above 0"),
        (["data.vqa.longest_side=0"], "data.vqa: longest_side = 0 must be at least 1"),
        (["run.max_skipped=1.5"], "run.max_skipped = 1.5 is a share of the samples; give 0 to 1"),
        (["run.bad_steps=-1"], "run.bad_steps = -1 must be 0 or more"),
        (["run.min_free_gb=-1"], "run.min_free_gb = -1.0 must be 0 or more"),
        (["train.learning_rate=.inf"], "train.learning_rate = inf must be finite and above 0"),
        (["train.learning_rate=.nan"], "train.learning_rate = nan must be a number"),
        (["train.head_lr_scale=.inf"], "train.head_lr_scale = inf must be finite and above 0"),
        (["train.steps=null", "train.epochs=.inf"], "train.epochs = inf must be finite and above 0"),
        (["train.weight_decay=-0.1"], "train.weight_decay = -0.1 must be finite and 0 or more"),
        (["train.weight_decay=.inf"], "train.weight_decay = inf must be finite and 0 or more"),
        (["lora.alpha=-8"], "lora.alpha = -8 must be at least 1"),
        (["loss.lm_weight=0", "loss.corr_weight=0", "loss.depth_weight=0"], "are all 0, so nothing is trained"),
        (["loss.lm_weight=.inf"], "loss.lm_weight = inf must be finite and 0 or more"),
        (["loss.corr_weight=.inf"], "loss.corr_weight = inf must be finite and 0 or more"),
        (["loss.temperature=1e308"], "loss.temperature = 1e+308 must be from 1e-18 to 1e+18"),
        (["loss.eps=0"], "loss.eps = 0.0 must be finite and above 0"),
    ],
)
def test_bad_input_is_one_line_that_names_the_cure(run_main, overrides, message):
    status, printed = run_main(*overrides)
    assert status != 0 and message in printed.splitlines()[-1], printed


def test_an_empty_data_root_is_refused(run_main, tmp_path):
    (tmp_path / "empty").mkdir()
    status, printed = run_main(f"data.scenes.root={tmp_path / 'empty'}")
    assert status != 0 and "no scene here" in printed


def test_a_model_of_unknown_type_is_refused(run_main, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    status, printed = run_main(f"model.source={tmp_path / 'model'}")
    assert status != 0 and "'gpt2'" in printed and "qwen2_5_vl" in printed


def test_a_second_run_into_the_same_folder_is_refused(config, run_main, tmp_path):
    out = tmp_path / "taken"
    out.mkdir()
    with guards.alone_in(out):
        status, printed = run_main(f"run.out={out}")
        assert status != 0 and "another run is writing" in printed and not list(out.iterdir())
    with guards.alone_in(out):
        pass


def test_a_batch_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"batch_size = 32 does not divide over 3 processes .* multiple of 3"):
        Share(0, 3, 32, 1)


def test_a_configuration_without_data_is_refused():
    with pytest.raises(ValueError, match=r"data\.scenes\.root, data\.qa\.root or data\.vqa\.root"):
        DataConfig(qa=QAConfig())


def test_a_deepspeed_file_that_would_round_the_heads_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"bf16": {"enabled": True}}))
    with pytest.raises(ValueError, match="enables bf16"):
        read_deepspeed(str(path))


def test_what_a_library_says_in_several_lines_is_one_line(config, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1, "reduce_bucket_size": "much"}}')
    settings = replace(config(), deepspeed=str(tmp_path / "ds.json"))
    process = launch(1, "-m", "gasp_fast.train", write_config(settings, tmp_path / "c.yaml"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "reduce_bucket_size Input should be a valid integer" in output.splitlines()[-1]
    assert output.splitlines()[-1].startswith("gasp_fast.train: ") and "Traceback" not in output


@pytest.mark.parametrize("settings", [{}, {"zero_optimization": {"stage": 0}}])
def test_a_deepspeed_file_without_zero_is_refused(tmp_path, settings):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="use deepspeed=null"):
        read_deepspeed(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a JSON object"),
        ('{"zero_optimization": 2}', "must be a JSON object, and bf16, fp16, zero_optimization in it too"),
        ('{"bf16": true, "zero_optimization": {"stage": 1}}', "must be a JSON object, and bf16"),
        ('{"zero_optimization": {"stage": 9}}', r"zero_optimization\.stage = 9; write 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 1, "offload_param": 5}}', "offload_param = 5; it must be a JSON object"),
        ('{"zero_optimization": {"stage": true}}', r"zero_optimization\.stage = True; write 1, 2 or 3"),
        ('{"zero_optimization": {"stage": [1]}}', r"zero_optimization\.stage = \[1\]; write 1, 2 or 3"),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}',
            "moves the optimiser to NVMe, from where checkpoints are not written; use the device cpu",
        ),
        ("[" * 100_000, "not JSON: maximum recursion depth"),
        ("{", "not JSON: "),
        ('{"zero_optimization": {"stage": 1' + "0" * 5000 + "}}", "not JSON: "),
    ],
)
def test_a_deepspeed_file_of_another_form_is_refused_in_a_line(tmp_path, text, message):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_deepspeed(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match=r"ds\.json: not a regular file"):
        read_deepspeed(str(path))


def test_a_source_of_weight_0_beside_another_is_not_read(config):
    data = config(mixed=True, scenes={"root": "nowhere", "weight": 0.0}).data
    assert list(data.used) == list(SampleStream(data).sources) == ["qa"]


def test_a_resumed_run_says_that_its_learning_rate_jumps(config, capsys):
    run = {"run": {"save_every": 2}}
    train(config(train={"steps": 4}, **run))
    assert "the learning rate goes" not in capsys.readouterr().err
    train(config(train={"steps": 4}, **run))
    assert "the learning rate goes" not in capsys.readouterr().err
    train(config(train={"steps": 8}, run={"save_every": 2, "allow_changes": ("train.steps",)}))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "the learning rate goes" in line]
    assert line.startswith("step 4: the learning rate goes from 0 to 0.000")


def test_a_deepspeed_file_that_contradicts_the_recipe_is_refused():
    share, clip = Share(0, 2, 8, 1), 1.0
    file = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "train_batch_size": "auto"}
    filled = fill_deepspeed({**file, "gradient_accumulation_steps": 4}, share, clip, hidden_size=10)
    assert filled["train_batch_size"] == 8 and filled["zero_optimization"]["reduce_bucket_size"] == 100
    with pytest.raises(ValueError, match=r"train_micro_batch_size_per_gpu = 2, the recipe makes it 1"):
        fill_deepspeed({**file, "train_micro_batch_size_per_gpu": 2}, share, clip, hidden_size=10)


def test_deepspeed_does_not_count_micro_batches_by_tokens_and_cannot_offload_them():
    share, zero = Share(0, 2, 7, tokens_at_once=4096), {"stage": 2, "reduce_bucket_size": "auto"}
    counted = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    file = {"zero_optimization": zero, **dict.fromkeys(counted, "auto")}
    filled = fill_deepspeed(file, share, 1.0, hidden_size=10)
    assert [filled[name] for name in counted] == [2, 1, 1]
    file["zero_optimization"] = {**zero, "offload_optimizer": {"device": "none"}}
    fill_deepspeed(file, share, 1.0, hidden_size=10)
    file["zero_optimization"] = {**zero, "offload_optimizer": {"device": "cpu"}}
    with pytest.raises(ValueError, match=r"train\.tokens_at_once = 4096: .* give train\.micro_batch_size instead"):
        fill_deepspeed(file, share, 1.0, hidden_size=10)


def test_adapters_outside_the_language_model_are_refused(config, family):
    model = build_model(config(family), CPU)
    assert guards.check_adapters(model) == 4 * model.backbone.layer_count
    from peft import LoraConfig, get_peft_model

    plain = build_model(config(family, train={"mode": "full"}), CPU)
    names = {"qwen2_5_vl": ["qkv", "q_proj"], "llava_next_video": ["q_proj", "k_proj", "v_proj", "o_proj"]}[family]
    grabbed = get_peft_model(plain.model, LoraConfig(r=2, target_modules=names))
    with pytest.raises(ValueError, match=r"adapters sit on .* 16 are expected"):
        guards.check_adapters(SupervisedModel(plain.backbone, grabbed, None))


def test_a_batch_without_its_token_types_is_refused(config):
    from gasp_fast.collator import Collator

    model = build_model(config(), CPU)
    batch = Collator(model.backbone)([SampleStream(config().data)[0]])
    guards.check_positions(model, batch)
    del batch["mm_token_type_ids"]
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        guards.check_positions(model, batch)


def test_weights_that_do_not_move_stop_the_run(config, monkeypatch):
    """Where a gradient does not arrive at an adapter, the run stops and names it."""
    import gasp_fast.training.model as model_module

    built = model_module.build_model

    def without_one_gradient(*args):
        model = built(*args)
        for name, parameter in model.named_parameters():
            if "layers.2.self_attn.v_proj.lora_B" in name:
                parameter.register_hook(torch.zeros_like)
        return model

    monkeypatch.setattr("gasp_fast.training.gasp.build_model", without_one_gradient)
    with pytest.raises(ValueError, match=r"1 of 24 watched weights .*layers\.2\.self_attn\.v_proj\.lora_B"):
        train(config(train={"steps": 6}))


def test_weights_that_no_loss_reaches_need_not_move(config):
    """With heads on layer 2 and no questions, no loss depends on the adapters above it."""
    settings = config(heads={"layers": "2"}, train={"steps": 6})
    train(settings)
    assert (Path(settings.run.out) / "checkpoint-6").is_dir()


def poison(monkeypatch, steps):
    """Make the loss of these steps (from 1) NaN."""
    real, seen = SupervisedModel.forward, []

    def forward(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        seen.append(None)
        if (len(seen) - 1) // 2 + 1 in steps:  # two micro-batches a step
            out["loss"] = out["loss"] * float("nan")
        return out

    monkeypatch.setattr(SupervisedModel, "forward", forward)


def test_a_step_without_a_finite_gradient_is_reported_and_skipped(config, monkeypatch, capsys):
    poison(monkeypatch, {2})
    settings = config(train={"steps": 4})
    train(settings)
    printed = capsys.readouterr().err
    assert "step 2: the gradient is not finite (scenes[" in printed and "the run stops after 3 more" in printed
    records = [json.loads(line) for line in (Path(settings.run.out) / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["loss"] is None for record in records] == [False, True, False, False]
    stored = load_file(Path(settings.run.out) / "checkpoint-4" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_without_a_finite_gradient_changes_no_weight_and_no_moment(config, monkeypatch, weight_decay):
    poison(monkeypatch, {3})
    train_settings = {"steps": 4, "weight_decay": weight_decay}
    settings = config(train=train_settings, run={"save_every": 1, "keep": 4})
    train(settings)

    def state(step):
        folder = Path(settings.run.out) / f"checkpoint-{step}"
        weights = {**load_file(folder / "adapter_model.safetensors"), **load_file(folder / "heads.safetensors")}
        return [*weights.values(), *load_file(folder / "optimizer-1.safetensors").values()]

    before, after, later = state(2), state(3), state(4)
    assert len(before) > 100
    assert all(map(torch.equal, before, after)) and not any(map(torch.equal, after[-3:], later[-3:]))


def test_too_many_bad_steps_stop_the_run_and_save_the_batch(config, monkeypatch):
    poison(monkeypatch, {2, 3})
    settings = config(train={"steps": 4}, run={"bad_steps": 1, "save_every": 2})
    with pytest.raises(ValueError, match=r"step 3: .* 2 such steps, run\.bad_steps = 1"):
        train(settings)
    batches = torch.load(Path(settings.run.out) / "bad-step-3-process-0.pt", weights_only=False)
    assert len(batches) == 2 and "input_ids" in batches[0] and len(batches[0]["matches"])
    monkeypatch.undo()
    poison(monkeypatch, {1})  # the first step of the resumed run, which counts on
    with pytest.raises(ValueError, match=r"step 3: .* 2 such steps, run\.bad_steps = 1"):
        train(settings)


def test_a_batch_that_is_not_saved_whole_leaves_no_file(config, tmp_path, monkeypatch):
    def dies(batches, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="no space left"):
        guards.check_bad_steps(
            config(run={"bad_steps": 0}).run, 1, "step 1", [{}], tmp_path / "bad-step-1-process-0.pt"
        )
    assert not list(tmp_path.glob("*bad-step*"))


def test_a_tracker_that_is_not_installed_is_one_line_with_the_command_that_installs_it(config, monkeypatch):
    monkeypatch.setattr(guards, "get_available_trackers", lambda: [])
    with pytest.raises(guards.GuardError, match=r"which is not installed; run .* -m pip install tensorboard, or leave"):
        guards.check_trackers(config(run={"report_to": ["tensorboard"]}).run)


def test_a_folder_with_checkpoints_is_not_begun_anew(config, run_main):
    train(config(train={"steps": 2}))
    status, printed = run_main("train.steps=2", "run.resume=never")
    assert status != 0 and "give another run.out" in printed


def test_a_dry_run_reports_and_leaves_nothing(config, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    settings = config(mixed=True)
    path.write_text(to_yaml(settings))
    assert main([str(path), "--dry-run", f"run.out={tmp_path / 'folder' / 'run'}"]) == 0
    printed = capsys.readouterr().out
    model = build_model(settings, CPU)
    for group in trained_groups(model):
        assert f"{group.count:,}" in printed and group.name in printed
    assert "one step:" in printed and "GB a process" in printed and "SDPA (CPU) attention" in printed
    assert "transformers' norms and MLPs" in printed and "keeps activations of 4 of 4 decoder layers" in printed
    assert not (tmp_path / "folder").exists()


def test_a_dry_run_succeeds_on_a_terminal_without_unicode(config, tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config()))
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    assert main([str(path), "--dry-run"]) == 0
    terminal.flush()
    assert b"one step: corr " in terminal.buffer.getvalue()


def test_checkpoints_are_kept_to_the_newest_and_the_best(config, monkeypatch):

    scores = iter([0.1, 0.9, 0.2, 0.3, 0.4])
    monkeypatch.setattr(Gasp, "score", lambda self, record: next(scores))
    settings = config(train={"steps": 5}, run={"save_every": 1, "keep": 2})
    train(settings)
    kept = [folder.name for folder in checkpoint_folders(Path(settings.run.out))]
    assert kept == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]

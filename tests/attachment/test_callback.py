"""`GaspCallback` in real trainers: the same steps as a loop of one's own, logged, saved and resumed."""

import pickle
import warnings
from pathlib import Path

import pytest
import torch
from support.runs import run_to_end
from support.trainer import Setting, toy
from transformers import TrainerCallback

import gasp_fast
from gasp_fast.supervision.head_files import read_heads


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("trainer"))


def test_steps_are_those_of_a_loop_with_accumulation_and_a_short_last_step(setting):
    """Three batches of an epoch in steps of two: the last step has one forward pass."""
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])

    model = setting.model()
    gasp = gasp_fast.attach(model, setting.processor)
    order = []
    trainer = setting.trainer(gasp, model, [0, 1, 2], [Watch()], gradient_accumulation_steps=2, num_train_epochs=1)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: (order.append(rows[0]), collate(rows))[1]
    trainer.train()
    assert sorted(order) == [0, 1, 2] and len(seen) == 2

    model = setting.model()
    gasp = gasp_fast.attach(model, setting.processor)
    parameters = [*model.parameters(), *gasp.parameters()]
    terms = []
    for numbers, found in zip((order[:2], order[2:]), seen, strict=True):
        for parameter in parameters:
            parameter.grad = None
        corr = 0.0
        for number in numbers:
            batch = setting.inputs(gasp, number)
            matches = batch.pop("matches")
            geometry = model(**batch).loss + gasp.loss(gasp.visual_positions(batch["input_ids"]), matches)
            (geometry / len(numbers)).backward()
            corr += float(gasp.metrics["corr"].mean()) / len(numbers)
        terms.append(corr)
        expected = [p.grad for p in parameters if p.grad is not None]
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
    logged = [line["corr"] for line in trainer.state.log_history if "corr" in line]
    assert logged == pytest.approx(terms, rel=1e-4)


def test_an_evaluation_is_logged_under_its_own_names(setting):
    model = setting.model()
    gasp = gasp_fast.attach(model, setting.processor)
    trainer = setting.trainer(gasp, model, [0, 1], max_steps=1)
    trainer.train()
    trainer.evaluate()
    line = trainer.state.log_history[-1]
    assert {"eval_loss", "eval_corr", "eval_pck", "eval_gasp_loss"} <= set(line) and "corr" not in line
    batch = setting.inputs(gasp, 0)
    with torch.no_grad():
        model.eval()(**batch)
    assert line["eval_corr"] == pytest.approx(float(gasp.metrics["corr"].mean()), rel=1e-5)


def test_trackers_that_come_later_see_the_terms(setting):
    lines = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            lines.append(dict(logs))

    model = setting.model()
    trainer = setting.trainer(gasp_fast.attach(model, setting.processor), model, [0], [Tracker()], max_steps=1)
    trainer.train()
    assert {"loss", "gasp_loss", "corr", "pck"} <= set(lines[0])
    assert "depth" not in lines[0]  # there are no depth maps


def test_a_collator_that_forgets_matches_is_refused_and_mixed_batches_are_counted(setting, monkeypatch):
    model = setting.model()
    start = next(model.parameters()).clone()
    gasp = gasp_fast.attach(model, setting.processor)
    trainer = setting.trainer(gasp, model, [0, 1], max_steps=2, gradient_accumulation_steps=2)
    monkeypatch.setattr(setting, "without", (0, 1))
    with pytest.raises(ValueError, match=r'no batch of the first step has matches; .*batch\["matches"\]'):
        trainer.train()
    assert torch.equal(next(model.parameters()), start)  # before the first update
    monkeypatch.setattr(setting, "instead", [("matches", None)])  # on purpose
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "GaspCallback")
        trainer.train()
    monkeypatch.setattr(setting, "instead", ())
    monkeypatch.setattr(setting, "without", (1,))
    with pytest.warns(UserWarning, match="GaspCallback") as seen:
        trainer.train()
    said = [str(one.message) for one in seen if "GaspCallback" in str(one.message)]
    assert len(said) == 2 and "a batch has no matches" in said[0] and "2 of 4 batches had no matches" in said[1]


# transformers 5.23 stores Qwen2.5-VL's weights under other names than those by which its Trainer restores them.
@pytest.mark.parametrize("adapters", [False, True], ids=["heads alone", "adapters"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(setting, tmp_path, adapters):
    import peft

    def run(resume=None, resume_from=None, out="run", steps=4):
        model = setting.model().requires_grad_(False)
        gasp = gasp_fast.attach(model, setting.processor)
        if adapters:
            torch.manual_seed(2)
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj"))
        trainer = setting.trainer(
            gasp, model, [0, 1, 2], resume_from=resume_from, max_steps=steps, save_strategy="steps", save_steps=2,
            optim="adamw_torch", learning_rate=1e-3, output_dir=str(tmp_path / out),
        )  # fmt: skip
        if resume is not None:
            start = [p.clone() for p in gasp.parameters()]
        trainer.train(resume_from_checkpoint=resume)
        if resume is not None:
            assert not all(map(torch.equal, start, gasp.parameters()))
        return model, gasp

    model, gasp = run()
    half = tmp_path / "run" / "checkpoint-2"
    saved = read_heads(half / "heads.safetensors")
    assert not torch.equal(saved.by_layer["0"].first.weight, gasp.parameters()[0])  # training went on
    again, gasp_again = run(resume=str(half))
    assert all(map(torch.equal, gasp_again.parameters(), gasp.parameters()))
    assert all(map(torch.equal, again.parameters(), model.parameters()))

    # From a checkpoint elsewhere: named, or refused instead of other heads taken.
    with pytest.raises(OSError, match="resume_from"):
        run(resume=str(half), out="elsewhere")
    _, gasp_moved = run(resume=str(half), resume_from=half, out="elsewhere")
    assert all(map(torch.equal, gasp_moved.parameters(), gasp.parameters()))
    other = tmp_path / "other" / "checkpoint-2"
    gasp_again.save(other)
    with pytest.raises(ValueError, match="other heads"):
        run(resume=str(half), resume_from=other, out="elsewhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remove_unused_columns": True}, "would drop the matches"),
        ({"restore_callback_states_from_checkpoint": True}, "restored without it"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(setting, options, message):
    model = setting.model()
    gasp = gasp_fast.attach(model, setting.processor)
    with pytest.raises(ValueError, match=message):
        setting.trainer(gasp, model, [0], **options)


def test_sft_trainer_with_adapters_of_its_own_trains_the_heads(setting, tmp_path):
    """TRL computes the text loss itself and adds adapters after `attach`; the heads' gradient must not be lost."""
    trl = pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    from datasets import Dataset
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    model = setting.model()
    gasp = gasp_fast.attach(model, setting.processor)
    texts_and_images = DataCollatorForVisionLanguageModeling(setting.processor)
    grads = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            grads.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    def collate(rows):
        matches = [gasp.matches(row["images"], row["uv"], row["visible"]) for row in rows]
        return {**texts_and_images(rows), "matches": gasp_fast.Matches.pack(matches)}

    settings = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=1, learning_rate=1e-3, logging_steps=1,
        use_cpu=True, bf16=False, disable_tqdm=True, max_length=None, remove_unused_columns=False, report_to="none",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, settings, collate, Dataset.from_list(toy.rows_for_trl([setting.sample])),
        processing_class=setting.processor, callbacks=[gasp_fast.GaspCallback(gasp), Watch()],
        peft_config=peft.LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj", init_lora_weights=False),
    )  # fmt: skip
    trainer.train()
    assert {"loss", "corr", "pck"} <= set(trainer.state.log_history[0])
    assert len([name for name in grads if name.startswith("gasp.")]) == 4 * len(gasp.layers)
    assert all(grads[name].any() for name in grads if name.startswith("gasp.") and name.endswith("weight"))
    assert (tmp_path / "checkpoint-2" / "heads.safetensors").is_file()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert all(map(torch.equal, gasp.parameters(), (p for n, p in trainer.model.named_parameters() if "gasp." in n)))


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [False, True], ids=["ddp", "zero2"])
def test_two_processes_take_the_step_of_one(setting, tmp_path, deepspeed):
    """Two samples, accumulated in one process or each in its own: the same weights, heads included."""
    (tmp_path / "model").symlink_to(setting.folder / "model")
    (tmp_path / "sample.pickle").write_bytes(pickle.dumps(setting.sample))

    def run(processes, name, *words):
        script = Path(__file__).with_name("trainer_step.py")
        done = run_to_end(processes, script, tmp_path, tmp_path / name, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(tmp_path / name, weights_only=True)

    one = run(1, "one.pt", "2")
    two = run(2, "two.pt", "1", *(["ds"] if deepspeed else []))
    start = dict(setting.model().named_parameters())
    assert two["corr"] == pytest.approx(one["corr"], rel=1e-5)
    assert any(name.startswith("gasp.") for name in one["weights"])
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-5, atol=1e-6)
        assert name not in start or name.endswith("bias") or not torch.equal(value, start[name]), name

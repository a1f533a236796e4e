"""Evaluation on held-out scenes while training measures what `gasp-fast evaluate` measures, and changes no weight."""

import io
import json
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from support.runs import launch, log_of, weights_of, without_clock

from gasp_fast.cli import main as gasp_fast
from gasp_fast.config.loader import to_yaml
from gasp_fast.data.synthetic.scenes import SyntheticConfig, make_scene, write_scene
from gasp_fast.data.tracks.sequences import is_held_out
from gasp_fast.evaluation.held_out import SequencesInMemory
from gasp_fast.run_folder import BEST, checkpoint_folders, weights_folder
from gasp_fast.train import held_out_sequences, main, train
from gasp_fast.training.config import EvaluateConfig
from gasp_fast.training.curves import RunLog, draw_curves
from gasp_fast.training.held_out import in_words, scalars, share_held_out
from gasp_fast.training.loop import TrainingLoop
from gasp_fast.training.summary import as_table

REPOSITORY = Path(__file__).parents[2]
SIZES = {"sequences": 3, "frames": 3, "grid": 5, "max_gap": 4}


@pytest.fixture(scope="session")
def other_scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("held-out")
    for seed in (100, 101):
        write_scene(make_scene(seed, SyntheticConfig(frames=8, width=96, height=80, samples=1)), root / f"s{seed}")
    return root


@pytest.fixture
def evaluated(config, other_scenes, tmp_path):
    """Makes configurations of small runs that are evaluated every two steps, each in its own folder."""

    def make(name="evaluated", evaluate=None, **parts):
        settings = config(**parts)
        fields = {"scenes": (str(other_scenes),), "every": 2, **SIZES, **(evaluate or {})}
        run = replace(settings.run, out=str(tmp_path / name))
        return replace(settings, run=run, evaluate=EvaluateConfig(**fields))

    return make


def evaluations_of(out):
    return {record["step"]: record["held_out"] for record in log_of(out) if "held_out" in record}


def training_of(out):
    """The other log lines, without what depends on the clock."""
    return without_clock(record for record in log_of(out) if "held_out" not in record)


def scripted(monkeypatch, values):
    """Let evaluations find these values of every metric, in turn, and then the last one."""
    real, left = SequencesInMemory.metrics, list(values)

    def metrics(self, outcomes):
        value = left.pop(0) if len(left) > 1 else left[0]
        return {**real(self, outcomes), "pck": value, "peak": value, "moved": value, "rho": value}

    monkeypatch.setattr(SequencesInMemory, "metrics", metrics)


@pytest.mark.parametrize("parts", [{}, {"train": {"mode": "full"}}, {"loss": {"corr_weight": 0, "depth_weight": 0}}])
def test_training_with_evaluation_gives_the_weights_of_training_without(evaluated, parts):
    """With dropout, questions and log lines of several steps."""
    parts = {"lora": {"dropout": 0.1}, "run": {"log_every": 3}, **parts, "mixed": True}
    parts["train"] = {"steps": 7, **parts.get("train", {})}
    runs = [evaluated("with", **parts), evaluated("without", evaluate={"scenes": ()}, **parts)]
    for settings in runs:
        train(settings)
    with_, without = (Path(settings.run.out) for settings in runs)
    assert list(evaluations_of(with_)) == [2, 4, 6, 7] and not evaluations_of(without)
    assert weights_of(with_ / "checkpoint-7") == weights_of(without / "checkpoint-7")
    assert training_of(with_) == training_of(without)


def test_modules_keep_their_mode_and_no_gradient_is_left(evaluated, monkeypatch):
    settings, seen = evaluated(lora={"dropout": 0.1}), []
    real = TrainingLoop.evaluate

    def evaluate(self, step, log):
        model = self.objective.model
        modes = [module.training for module in model.modules()]
        save = real(self, step, log)
        seen.append(modes == [module.training for module in model.modules()] and any(modes))
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
        return save

    monkeypatch.setattr(TrainingLoop, "evaluate", evaluate)
    train(settings)
    assert seen == [True, True]


@pytest.mark.parametrize(
    ("family", "mode", "features"),
    [("qwen2_5_vl", "full", "auto"), ("qwen2_5_vl", "lora", "qk"), ("llava_next_video", "lora", "auto")],
)
def test_the_numbers_are_those_of_the_report_on_the_checkpoint(
    evaluated, other_scenes, tmp_path, family, mode, features
):
    """To the bit where the weights are stored as they are trained; merged adapters differ by rounding."""
    settings = evaluated(evaluate={"features": features}, family=family, train={"mode": mode, "steps": 2})
    train(settings)
    sizes = ("--sequences", 3, "--frames", 3, "--grid", 5, "--max-gap", 4, "--batch", 1, "--pictures", 0)
    kind = "head" if features == "auto" else features
    folder = Path(settings.run.out) / "best"
    command = ["evaluate", "--model", folder, "--scenes", other_scenes, *sizes, "--features", kind]
    assert gasp_fast([*map(str, command), "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    measured = evaluations_of(settings.run.out)[2]
    same = (lambda value: value) if mode == "full" else partial(pytest.approx, abs=1e-3)
    assert measured["features"] == kind and measured["layers"] == report["layers"]
    assert measured["sequences"] == report["sequences"] > 0
    for ours, theirs in (("pck", "pck"), ("moved", "pck_moved"), ("rho", "rho")):
        assert measured[f"{ours}_per_layer"] == same(report[theirs]["per_layer"])
    assert measured["pck"] == same(report["pck"]["mean"]) and measured["peak"] == same(report["pck"]["peak"])
    best = report["layers"].index(report["pck"]["peak_layer"])
    assert measured["moved"] == same(report["pck_moved"]["per_layer"][best])
    assert measured["identity"] == report["identity"]


def test_a_model_in_bf16_is_evaluated_as_it_computes(evaluated):
    settings = evaluated(model={"dtype": "bf16"}, heads={"compute": "auto"}, train={"steps": 2})
    train(settings)
    assert 0 <= evaluations_of(settings.run.out)[2]["pck"] <= 1


def test_the_best_checkpoint_is_saved_linked_and_kept(evaluated, monkeypatch, tmp_path, capsys):
    scripted(monkeypatch, [0.2, 0.5, 0.5, None, 0.4])
    settings = evaluated(train={"steps": 10}, run={"save_every": 3, "keep": 1})
    train(settings)
    out = Path(settings.run.out)
    assert [metrics["best"] for metrics in evaluations_of(out).values()] == [True, True, False, False, False]
    assert [folder.name for folder in checkpoint_folders(out)] == ["checkpoint-4", "checkpoint-10"]
    assert (out / BEST).readlink() == Path("checkpoint-4")
    assert weights_folder(out / BEST) == out / "checkpoint-4"
    assert gasp_fast(["export", str(out / BEST), "--out", str(tmp_path / "exported")]) == 0
    assert json.loads((tmp_path / "exported" / "gasp_export.json").read_text())["checkpoint"] == "checkpoint-4"


def test_a_link_that_a_killed_run_did_not_renew_is_renewed(evaluated, monkeypatch):
    scripted(monkeypatch, [0.2, 0.5])
    settings = evaluated(train={"steps": 4})
    train(settings)
    link = Path(settings.run.out) / BEST
    link.unlink()
    link.symlink_to("checkpoint-2")
    train(settings)
    assert link.readlink() == Path("checkpoint-4")


def test_without_keep_best_evaluation_saves_nothing(evaluated):
    settings = evaluated(train={"steps": 5}, run={"keep_best": False})
    train(settings)
    assert [folder.name for folder in checkpoint_folders(Path(settings.run.out))] == ["checkpoint-5"]
    assert not (Path(settings.run.out) / BEST).is_symlink()


def test_a_run_out_of_patience_ends_with_a_line_and_stays_ended(evaluated, monkeypatch, tmp_path, capsys):
    scripted(monkeypatch, [0.2, 0.5, 0.5, 0.4, 0.3])
    settings = evaluated(train={"steps": 20}, evaluate={"patience": 2, "best": "rho"})
    (path := tmp_path / "p.yaml").write_text(to_yaml(settings))
    out = Path(settings.run.out)
    line = (
        "gasp_fast.train: step 8: stopped early: no better rho in 2 evaluations (evaluate.patience); the best, 0.5000"
    )
    for _ in range(2):
        assert main([str(path)]) == 0
        (said,) = [said for said in capsys.readouterr().err.splitlines() if "stopped early" in said]
        assert said == f"{line}, is of step 4: {out}"
        assert list(evaluations_of(out)) == [2, 4, 6, 8] and training_of(out)[-1]["step"] == 8
        assert [folder.name for folder in checkpoint_folders(out)] == ["checkpoint-2", "checkpoint-4", "checkpoint-8"]
        assert (out / "training.png").exists()
    assert main([str(path), "evaluate.patience=3"]) == 0  # goes on, and counts on
    assert list(evaluations_of(out)) == [2, 4, 6, 8, 10]


def test_a_killed_run_counts_on(evaluated, tmp_path):
    """Its evaluations, its best checkpoint and its patience are those of the run that was not killed."""
    parts = {"train": {"steps": 9}, "run": {"save_every": 3}, "mixed": True, "evaluate": {"patience": 3}}
    whole, broken = evaluated("whole", **parts), evaluated("broken", **parts)
    train(whole)
    (path := tmp_path / "killed.yaml").write_text(to_yaml(broken))
    process = launch(1, "-m", "gasp_fast.train", path)
    log, end = Path(broken.run.out) / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and '"step": 4,' in log.read_text()):
        assert process.poll() is None and time.monotonic() < end, process.stdout.read()
        time.sleep(0.02)
    process.kill()
    process.wait()
    train(broken)

    def decisions(settings):
        metrics = evaluations_of(settings.run.out)
        return {step: {name: m[name] for name in m if name != "seconds"} for step, m in metrics.items()}

    assert decisions(broken) == decisions(whole)
    assert training_of(broken.run.out) == training_of(whole.run.out)
    abouts = [json.loads((Path(s.run.out) / "best" / "about.json").read_text()) for s in (whole, broken)]
    assert abouts[0]["held_out"] == abouts[1]["held_out"]
    last = [checkpoint_folders(Path(s.run.out))[-1] for s in (whole, broken)]
    assert weights_of(last[0]) == weights_of(last[1])


def test_with_another_metric_a_resumed_run_chooses_the_best_anew(evaluated, capsys):
    settings = evaluated(train={"steps": 4})
    train(settings)
    other = replace(settings, evaluate=replace(settings.evaluate, best="moved"))
    run = replace(other.run, allow_changes=("train.steps",))
    train(replace(other, train=replace(other.train, steps=6), run=run))
    assert "have changed: the best checkpoint is chosen anew" in capsys.readouterr().err
    assert evaluations_of(settings.run.out)[6]["best"]


def test_the_time_of_an_evaluation_is_no_time_of_a_step(evaluated, monkeypatch):
    real, later = TrainingLoop.evaluate, []

    def evaluate(self, step, log):
        before = self.meter.start  # from when on the time of the next steps counts
        save = real(self, step, log)
        later.append(self.meter.start - before)
        return save

    monkeypatch.setattr(TrainingLoop, "evaluate", evaluate)
    settings = evaluated()
    train(settings)
    seconds = [metrics["seconds"] for metrics in evaluations_of(settings.run.out).values()]
    assert later == pytest.approx(seconds) and min(seconds) > 0


@pytest.mark.parametrize(
    ("evaluate", "scenes", "message"),
    [
        ({"scenes": "trained"}, {}, "is trained on; set data.scenes.held_out=0.05"),
        ({"sequences": 1, "scenes": "two"}, {}, "evaluate.sequences = 1 is less than one for each"),
        ({"frames": 9, "max_gap": 9}, {}, "the longest scene has 8 frames"),
        ({"scenes": "none", "patience": 2}, {}, "evaluate.patience = 2 needs evaluate.scenes"),
        ({"features": "head"}, {"loss": {"corr_weight": 0, "depth_weight": 0}}, "this run has no heads"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused_at_the_start(evaluated, assets, evaluate, scenes, message):
    folders = {"trained": (str(assets.scenes),), "two": (str(assets.scenes / "scene-0"), "nowhere"), "none": ()}
    evaluate = {**evaluate, **({"scenes": folders[evaluate["scenes"]]} if "scenes" in evaluate else {})}
    with pytest.raises((ValueError, OSError), match=message.replace("(", r"\(")):
        train(evaluated(evaluate=evaluate, **scenes))


def test_of_the_training_scenes_only_those_held_out_are_evaluated(evaluated, assets):
    parts = {"scenes": {"held_out": 0.3}, "train": {"steps": 2}, "evaluate": {"scenes": (str(assets.scenes),)}}
    settings = evaluated(**parts)
    names = {entry.name for one in held_out_sequences(settings).sets for entry in one.scenes}
    assert names == {path.name for path in assets.scenes.iterdir() if is_held_out(path.name, 0.3)}
    assert len(names) == 2
    train(settings)
    assert evaluations_of(settings.run.out)[2]["sequences"] == 3


def test_a_baseline_is_evaluated_on_the_scenes_that_its_recipe_holds_out(config, assets):
    def share(held_out, **scenes):
        settings = config(mixed=True, scenes={"held_out": held_out, **scenes})
        return share_held_out(settings, assets.scenes / "scene-0")

    assert share(0.3) == share(0.3, only_counted=True) == 0.3
    assert share(0.0, only_counted=True) == 0.0  # all: nothing of them is trained on


def test_sequences_that_cannot_be_read_are_named_and_left_out(evaluated, other_scenes, tmp_path, capsys):
    scenes = shutil.copytree(other_scenes, tmp_path / "scenes")
    for path in sorted((scenes / "s100" / "color").iterdir())[1:]:  # without the first frame, it would be no scene
        path.write_bytes(path.read_bytes()[:50])
    settings = evaluated(train={"steps": 2}, evaluate={"scenes": (str(scenes),)})
    train(settings)
    assert "s100: left out:" in capsys.readouterr().err
    assert 0 < evaluations_of(settings.run.out)[2]["sequences"] < 3


METRICS = {
    "features": "head", "sequences": 16, "layers": [2, 3], "pck": 0.25, "peak": 0.5, "peak_layer": 3, "moved": None,
    "rho": 0.125, "identity": 0.4, "pck_per_layer": [0.0, 0.5], "moved_per_layer": [None, None],
    "rho_per_layer": [None, 0.125], "best": True, "seconds": 2.0,
}  # fmt: skip


def test_trackers_get_a_number_for_each_name_and_layer():
    numbers = scalars(METRICS)
    assert numbers["held_out/pck"] == 0.25 and numbers["held_out/pck/layer_3"] == 0.5
    assert "held_out/moved" not in numbers and "held_out/rho/layer_2" not in numbers
    assert numbers["held_out/seconds"] == 2.0


def test_the_line_names_the_metrics_that_are_defined():
    assert in_words(METRICS) == (
        "held out: pck 0.250 · peak 0.500 · rho 0.125 · best layer 3 · 16 sequences in 2.0 s · the best so far"
    )


def test_the_summary_shows_the_first_and_the_last_evaluation():
    later = {**METRICS, "pck": 0.75, "moved": 0.5}
    evaluations = [{"step": 10, "held_out": METRICS}, {"step": 20, "held_out": later}]
    numbers = dict.fromkeys(("lm", "corr", "depth", "grad_norm", "tokens_per_s"), 1.0)
    records = [{"step": step, "pck_per_layer": [0.5, 0.25], **numbers} for step in range(1, 21)]
    console = Console(file=io.StringIO(), width=100)
    console.print(as_table(records, evaluations))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    rows = {" ".join(words[:-2]): words[-2:] for words in lines}
    assert rows["held out: PCK@2, mean of layers"] == ["0.250", "0.750"]
    assert rows["held out: PCK@2 of moved points"] == ["–", "0.500"]
    figure = draw_curves({"run": RunLog(records, evaluations)})
    (panel,) = [axis for axis in figure.axes if axis.get_title() == "On held-out scenes"]
    drawn = {line.get_label(): line.get_ydata().tolist() for line in panel.lines}
    assert drawn["PCK@2, mean of layers"] == [0.25, 0.75] and len(drawn) == 4


@pytest.mark.slow
def test_two_processes_share_the_sequences_under_every_zero_stage(evaluated, tmp_path):
    """Three sequences: one process runs one of them again. Weights are those of runs without evaluation."""
    paths, parts = [], {"train": {"steps": 5}, "mixed": True, "lora": {"dropout": 0.1}}
    for name in ("ddp", "zero1", "zero2", "zero3"):
        preset = None if name == "ddp" else str(REPOSITORY / f"configs/deepspeed/{name}.json")
        for scenes in ({}, {"scenes": ()}):
            run = f"{name}-without" if scenes else name
            settings = replace(evaluated(run, evaluate=scenes, **parts), deepspeed=preset)
            paths.append(tmp_path / f"{run}.yaml")
            paths[-1].write_text(to_yaml(settings))
    process = launch(1, Path(__file__).with_name("train_on_two_processes.py"), *paths)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    found = {name: evaluations_of(tmp_path / name) for name in ("ddp", "zero1", "zero2", "zero3")}
    for name, evaluations in found.items():
        assert list(evaluations) == [2, 4, 5], name
        folders = [tmp_path / run / "checkpoint-5" for run in (name, f"{name}-without")]
        assert weights_of(folders[0]) == weights_of(folders[1]), name
        assert training_of(tmp_path / name) == training_of(tmp_path / f"{name}-without"), name
        for step, metrics in evaluations.items():
            assert metrics["sequences"] == 3
            assert metrics["pck_per_layer"] == pytest.approx(found["ddp"][step]["pck_per_layer"], abs=0.02), name

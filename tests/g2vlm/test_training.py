"""G²VLM through the training loop that GASP uses: stages, resume, processes, packs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.runs import log_of, run_to_end, without_clock, write_config

from gasp_fast.config.loader import keys_of
from gasp_fast.config.recipes import RECIPES
from gasp_fast.g2vlm import objective as objective_module
from gasp_fast.g2vlm.config import (
    G2TrainConfig,
)
from gasp_fast.g2vlm.held_out import UnseenScenes, scores_of
from gasp_fast.g2vlm.objective import RULES, G2Objective
from gasp_fast.g2vlm.planning import parameter_counts, shapes_of
from gasp_fast.g2vlm.tiny import build_tiny_encoder
from gasp_fast.train import read_recipe, train

SLOW = {"batch_size": 2, "learning_rate": 1e-5, "warmup": 0.0}


def weights_of(folder):
    return {name: value for file in sorted(Path(folder).glob("model-*")) for name, value in load_file(file).items()}


def assert_equal(ours, theirs, tolerance=0.0):
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def test_a_run_that_is_stopped_and_resumed_ends_as_if_it_had_not_been(recipe, tmp_path):
    train(recipe(run={"out": str(tmp_path / "whole")}))
    train(recipe(run={"out": str(tmp_path / "parts"), "save_every": 2}))
    parts = tmp_path / "parts"
    (parts / "checkpoint-4").rename(tmp_path / "checkpoint-4")
    train(recipe(run={"out": str(parts), "save_every": 2}))
    assert_equal(weights_of(parts / "checkpoint-4"), weights_of(tmp_path / "whole" / "checkpoint-4"))
    assert without_clock(log_of(parts)) == without_clock(log_of(tmp_path / "whole"))


def test_how_a_step_is_divided_into_packs_changes_nothing_but_rounding(recipe, tmp_path):
    changed = {"steps": 1, "batch_size": 4}
    records = []
    for at_once in (1, 10_000):
        out = str(tmp_path / f"{at_once}")
        train(recipe(run={"out": out}, train={**changed, "tokens_at_once": at_once, "learning_rate": 1e-3}))
        records.append(log_of(out)[0])
    for name in ("loss", "local", "world", "normal", "rotation", "translation", "grad_norm"):
        assert records[0][name] == pytest.approx(records[1][name], rel=1e-4), name


@pytest.mark.parametrize("deepspeed", [None, "zero2"])
def test_two_processes_take_the_step_of_one(recipe, tmp_path, deepspeed):
    records = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}"
        config = recipe(
            run={"out": str(out)},
            train={"steps": 2, "batch_size": 4, "learning_rate": 1e-3},
            deepspeed=None if processes == 1 else deepspeed,
        )
        path = write_config(config, tmp_path / f"{processes}.yaml")
        done = run_to_end(processes, "-m", "gasp_fast.train", path)
        assert done.returncode == 0, done.stderr[-2000:]
        records.append(log_of(out))
    for one, two in zip(*records, strict=True):
        for name in ("loss", "local", "normal", "rotation"):
            assert one[name] == pytest.approx(two[name], rel=1e-3), name


def test_the_stages_follow_each_other(recipe, questions, tmp_path):
    """Pretraining, then each variant of the joint stage from its checkpoint; what is frozen stays as it was."""
    first = tmp_path / "first"
    train(recipe(run={"out": str(first)}, train={"steps": 1, "batch_size": 2, "learning_rate": 0.05, "warmup": 0.0}))
    start = {"start": str(first / "checkpoint-1")}
    before = weights_of(first / "checkpoint-1")
    model = recipe().model
    variants = {
        "semantic": {"text_weight": 1.0, "geometry_weight": 0.0},
        "both": {"text_weight": 1.0, "geometry_weight": 1.0},
    }
    for mode, loss in variants.items():
        out = tmp_path / mode
        config = recipe(
            str(questions),
            model={"source": model.source, "encoder": model.encoder, **start},
            train={"mode": mode, "steps": 1, **SLOW},
            loss=loss,
            run={"out": str(out)},
        )
        train(config)
        record, after = log_of(out)[0], weights_of(out / "checkpoint-1")
        assert record["lm"] > 0 and ("local" in record) == (mode == "both")
        shared = before.keys() & after.keys()
        assert bool(shared) == (mode == "both")  # the geometric expert is trained again, or not at all
        assert all((after[name] - before[name]).abs().max() < 2e-5 for name in shared)  # they began where it ended
        assert not shared or any(not torch.equal(before[name], after[name]) for name in shared)
    third = {"start": str(tmp_path / "semantic" / "checkpoint-1")}  # holds no geometry: that is of the first stage
    train(recipe(run={"out": str(tmp_path / "third")}, model={**vars(model), **third}, train={"steps": 1, **SLOW}))
    after = weights_of(tmp_path / "third" / "checkpoint-1")
    assert after.keys() == before.keys() and all((after[name] - before[name]).abs().max() < 2e-5 for name in after)


def test_gasp_supervises_the_joint_stage_by_one_key(recipe, questions, tmp_path):
    steps = {"mode": "both", "steps": 2, "batch_size": 4, "tokens_at_once": 10_000, "learning_rate": 1e-3}
    joint = {"train": steps, "loss": {"text_weight": 1.0}}
    logs, weights = [], []
    for weight in (0.0, 1.0):
        out = tmp_path / f"{weight}"
        train(recipe(str(questions), gasp={"weight": weight}, run={"out": str(out), "save_every": 1}, **joint))
        logs.append(log_of(out))
        weights.append(weights_of(out / "checkpoint-2"))
    apart = {**joint, "train": {**steps, "steps": 1, "tokens_at_once": 1}}  # a pack for each sequence
    train(recipe(str(questions), gasp={"weight": 1.0}, run={"out": str(tmp_path / "apart")}, **apart))
    without, first = logs[0][0], logs[1][0]
    for name in ("loss", "corr", "depth", "pck_per_layer", "grad_norm"):
        assert log_of(tmp_path / "apart")[0][name] == pytest.approx(first[name], rel=1e-4), name
    assert "corr" not in without and first["lm"] == pytest.approx(without["lm"], rel=1e-5)
    assert len(first["corr_per_layer"]) == len(first["pck_per_layer"]) == 2 and first["corr"] > 0 and first["depth"] > 0
    gasp = 0.3 * first["corr"] + first["depth"]
    assert first["loss"] - without["loss"] == pytest.approx(gasp, rel=1e-3)
    heads = {name: value for name, value in weights[1].items() if name.startswith("gasp.")}
    assert len(heads) == 2 * 4 and weights[1].keys() - heads.keys() == weights[0].keys()
    config = recipe(str(questions), gasp={"weight": 1.0}, **joint)
    trained, _ = parameter_counts(config, shapes_of(config)[0])
    assert trained["gasp"] == sum(value.numel() for value in heads.values())
    whole, out = weights[1], tmp_path / "1.0"
    (out / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    train(recipe(str(questions), gasp={"weight": 1.0}, run={"out": str(out), "save_every": 1}, **joint))  # resumes
    assert_equal(weights_of(out / "checkpoint-2"), whole)
    model = {"source": config.model.source, "encoder": config.model.encoder, "start": str(out / "checkpoint-2")}
    train(recipe(str(questions), model=model, run={"out": str(tmp_path / "later")}, **joint))  # without GASP
    assert log_of(tmp_path / "later")[0]["lm"] < without["lm"]
    with pytest.raises(ValueError, match=r"gasp.weight = 1.0 needs data.questions"):
        recipe(gasp={"weight": 1.0})


def test_evaluation_while_training_chooses_the_best_checkpoint(recipe, assets, tmp_path):
    evaluate = {"scenes": (str(assets.scenes),), "every": 2, "sequences": 2, "frames": 3, "stride": 1}
    data = {"roots": (str(assets.scenes),), "side": 56, "max_frames": 3, "workers": 0, "held_out": 0.3}
    train(recipe(evaluate=evaluate, data=data))
    found = [record["held_out"] for record in log_of(tmp_path / "run") if "held_out" in record]
    assert len(found) == 2 and found[0]["best"] and found[0]["sequences"] == 2
    for name in ("abs_rel", "delta", "rra", "rta", "auc"):
        assert 0 <= found[0][name] < 10, name
    assert (tmp_path / "run" / "best").exists() and (tmp_path / "run" / "training.png").exists()


def test_the_optimiser_and_its_rates_are_the_papers(recipe):
    objective = G2Objective(recipe(train={"steps": 10, "batch_size": 2, "learning_rate": 1e-3, "warmup": 0.2}))
    objective.build(torch.device("cpu"))
    [group] = objective.make_optimizer().param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-15, 0.0)
    rates = [1e-3 * objective.schedule(10)(step) for step in range(11)]
    assert rates[0] == 0 and rates[2] == 1e-3 and rates[10] == pytest.approx(1e-7)


def test_the_truth_in_another_unit_has_the_best_scores(recipe, assets):
    evaluate = {"scenes": (str(assets.scenes),), "sequences": 1, "frames": 3, "stride": 2}
    with pytest.raises(ValueError, match=r"is trained on; set data.held_out=0.05"):
        UnseenScenes(recipe(evaluate=evaluate))
    data = {"roots": (str(assets.scenes),), "side": 56, "max_frames": 3, "workers": 0, "held_out": 0.3}
    pack = UnseenScenes(recipe(evaluate=evaluate, data=data)).pack(0)
    planted = pack.true.scaled(torch.full((1,), 3.0))
    scores = scores_of(lambda images: SimpleNamespace(geometry=planted), pack, torch.device("cpu"))
    assert scores.depth.abs_rel < 1e-5 and scores.depth.delta == 1 and scores.depth.scale == pytest.approx(1 / 3)
    assert scores.poses.rra == scores.poses.rta == 1 and scores.poses.auc == 1


def test_every_rule_names_a_key():
    assert {*RULES.free, *RULES.rounding, *RULES.fixed} <= set(keys_of(G2TrainConfig))


def test_what_the_saved_weights_do_not_fit_is_refused(recipe):
    train(recipe(train={"steps": 2, "batch_size": 2}))
    with pytest.raises(ValueError, match=r"experts\.qk_norm = True, now False \(other weights are trained\)"):
        train(recipe(train={"steps": 2, "batch_size": 2}, experts={"qk_norm": False, "checkpointing": "off"}))


def test_the_recipes_of_the_stages_are_complete_but_for_places():
    names = sorted(path.stem for path in (RECIPES / "g2vlm").glob("*.yaml"))
    assert len(names) >= 6
    for name in names:
        assert isinstance(read_recipe(f"g2vlm/{name}", []), G2TrainConfig)


def test_a_group_that_no_gradient_reaches_stops_the_run(recipe, monkeypatch):
    real = objective_module.build

    def without_gradient(*arguments):
        built = real(*arguments)
        for name, parameter in built.model.named_parameters():
            if parameter.requires_grad and name.startswith("heads."):
                parameter.register_hook(torch.zeros_like)
        return built

    monkeypatch.setattr(objective_module, "build", without_gradient)
    with pytest.raises(ValueError, match=r"no weight of heads has moved after 5 steps"):
        train(recipe(train={"steps": 6, "batch_size": 2, "learning_rate": 1e-3}))


def test_another_encoder_is_noticed_when_a_run_is_resumed(recipe, g2_models, tmp_path):
    settings = {"steps": 1, "batch_size": 2}
    train(recipe(train=settings))
    other = build_tiny_encoder(tmp_path / "dino", width=32, layers=1, heads=2, seed=1)
    source = {"source": str(g2_models / "qwen"), "encoder": str(other)}
    with pytest.raises(ValueError, match=r"a model of other encoder's weights.*trained on the base model that it was"):
        train(recipe(train=settings, model=source, run={"out": str(tmp_path / "run"), "allow_changes": ("model",)}))

"""Whole evaluations of tiny models on rendered scenes: every metric equals loops in float64; a stopped one resumes."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation import brute_force

from gasp_fast.backbones import tiny
from gasp_fast.collator import Collator, CollatorConfig
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes
from gasp_fast.evaluation.dataset import EvaluationSet, EvaluationSetConfig
from gasp_fast.evaluation.evaluate import EvaluationConfig, evaluate
from gasp_fast.evaluation.evaluated_model import load_evaluated_model
from gasp_fast.evaluation.features import KINDS, run_with_features
from gasp_fast.evaluation.predict import Predictor


@pytest.fixture
def config(dataset):
    return EvaluationConfig(data=dataset.config, batch=2)


@pytest.mark.parametrize("rope", ["before", "after"])
def test_every_metric_of_a_model_equals_brute_force(model, dataset, rope, tmp_path):
    config = EvaluationConfig(data=dataset.config, batch=2, rope=rope)
    report = evaluate(model, dataset, config, tmp_path).report
    collator = Collator(model.backbone, CollatorConfig(anchors="first"))
    correct: dict = {}  # (kind, layer) -> a list for each sequence
    confidence: dict = {}
    gaps, moved = [], []
    for index in range(len(dataset)):
        batch, frames = collator([dataset.sample(index)]), dataset.frames(index)
        matches, xy = batch["matches"], batch["matches"].token_xy
        frame = torch.bucketize(matches.target, matches.frame_offsets, right=True) - 1
        gaps.append([frames[f] - frames[0] for f in frame.tolist()])
        offset = (xy[matches.anchor] - xy[matches.target]).double().norm(dim=1)
        moved.append((offset > 2).tolist())
        features: dict = {}
        run_with_features(
            model, batch, lambda kind, layer, q, k, to=features: to.update({(kind, layer): (q, k)}), KINDS, rope
        )
        for key, (queries, keys) in features.items():
            _, confidences, corrects = brute_force.predictions(queries, keys, matches, 0.07)
            correct.setdefault(key, []).append(corrects)
            confidence.setdefault(key, []).append(confidences)
    assert sum(map(len, gaps)) > 100 and any(map(any, moved))
    for kind in KINDS:
        metrics = report["by_features"][kind]
        for layer in range(4):
            pck = [brute_force.mean(one) for one in correct[kind, layer]]
            assert metrics["pck"]["per_layer"][layer] == pytest.approx(brute_force.mean(pck))
            assert metrics["pck"]["per_layer_std"][layer] == pytest.approx(brute_force.deviation(pck))
            pairs = zip(correct[kind, layer], moved, strict=True)
            of_moved = [[c for c, m in zip(*pair, strict=True) if m] for pair in pairs]
            expected = brute_force.mean([brute_force.mean(one) for one in of_moved if one])
            assert metrics["pck_moved"]["per_layer"][layer] == pytest.approx(expected)
            flat_confidence, flat_correct = list(chain(*confidence[kind, layer])), list(chain(*correct[kind, layer]))
            expected = brute_force.pearson(flat_confidence, flat_correct)
            assert metrics["rho"]["per_layer"][layer] == pytest.approx(expected, abs=1e-4)
            pairs = list(zip(flat_confidence, flat_correct, strict=True))
            of_correct, of_wrong = ([s for s, c in pairs if c == value] for value in (True, False))
            expected = brute_force.mean(of_correct) - brute_force.mean(of_wrong)
            assert metrics["calibration_gap"]["per_layer"][layer] == pytest.approx(expected, abs=1e-5)
        per_gap = [
            brute_force.mean([c for c, g in zip(one_correct, one_gap, strict=True) if g == 1])
            for one_correct, one_gap in zip(correct[kind, metrics["pck"]["peak_layer"] - 1], gaps, strict=True)
            if 1 in one_gap
        ]
        assert metrics["temporal"]["pck"][0] == pytest.approx(brute_force.mean(per_gap))
        assert metrics["identity"] == pytest.approx(brute_force.mean([1 - brute_force.mean(one) for one in moved]))
    assert {key: report[key] for key in ("sequences", "frames", "grid", "features")} == {
        "sequences": 5, "frames": 4, "grid": 5, "features": "head",
    }  # fmt: skip


def test_predictions_do_not_depend_on_the_batch_size(models, dataset, tmp_path):
    reports = [
        evaluate(models["qwen-gqa"], dataset, EvaluationConfig(data=dataset.config, batch=n), tmp_path / f"{n}")
        for n in (1, 3, 5)
    ]
    first = reports[0].report["by_features"]
    for other in reports[1:]:
        for kind in KINDS:
            assert np.allclose(
                first[kind]["pck"]["per_layer"], other.report["by_features"][kind]["pck"]["per_layer"], atol=0.02
            )


class _Killed(Exception):
    pass


def test_a_stopped_evaluation_resumes(models, dataset, config, tmp_path):
    model = models["qwen-gqa"]
    whole = evaluate(model, dataset, config, tmp_path / "whole").report

    def kill(done: int, total: int) -> None:
        if done >= 2:
            raise _Killed

    with pytest.raises(_Killed):
        evaluate(model, dataset, config, tmp_path / "part", progress=kill)
    saved = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "part" / "answers").glob("*.npz")}
    assert sorted(saved) == ["00000.npz", "00001.npz"]
    seen: list[tuple[int, int]] = []
    resumed = evaluate(model, dataset, config, tmp_path / "part", progress=lambda *pair: seen.append(pair)).report
    assert seen[0] == (2, 5) and seen[-1] == (5, 5)
    assert resumed == whole
    assert evaluate(model, dataset, config, tmp_path / "part").report == whole  # nothing is left to compute
    for name, time_before in saved.items():
        assert (tmp_path / "part" / "answers" / name).stat().st_mtime_ns == time_before


def test_a_damaged_prediction_file_is_computed_again(models, dataset, config, tmp_path):
    model = models["qwen-gqa"]
    whole = evaluate(model, dataset, config, tmp_path).report
    broken = tmp_path / "answers" / "00003.npz"
    broken.write_bytes(broken.read_bytes()[:100])
    assert evaluate(model, dataset, config, tmp_path).report == whole


@pytest.mark.parametrize("rope", ["before", "after"])
def test_frames_of_a_doubled_video_are_scored_frame_by_frame(model_folders, dataset, tmp_path, rope):
    """The same points at the same tokens as with images, other features, and other predictions on disk."""
    config = EvaluationConfig(data=dataset.config, features=("qk", "hidden"), rope=rope, batch=2)
    reports = {}
    for choice in ("images", "video_doubled"):
        evaluated = load_evaluated_model(model_folders["qwen-gqa"], frames_as=choice)
        out = tmp_path / choice
        reports[choice] = evaluate(evaluated, dataset, config, out)
        other = load_evaluated_model(model_folders["qwen-gqa"])
        if choice != "images":
            with pytest.raises(ValueError, match="frames_as"):
                evaluate(other, dataset, config, out)
    for ours, theirs in zip(*(one.predictions for one in reports.values()), strict=True):
        assert np.array_equal(ours.anchor, theirs.anchor) and np.array_equal(ours.target, theirs.target)
        assert np.array_equal(ours.gap, theirs.gap)
    hidden = [np.concatenate([one.confidence["hidden"] for one in r.predictions], 1) for r in reports.values()]
    assert not np.allclose(hidden[0], hidden[1])


def test_predictions_of_other_settings_are_not_reused(models, dataset, config, tmp_path):
    evaluate(models["qwen-gqa"], dataset, config, tmp_path)
    other = EvaluationConfig(data=dataset.config, temperature=0.1)
    with pytest.raises(ValueError, match=r"temperature: 0.07 there, 0.1 now.*--fresh"):
        evaluate(models["qwen-gqa"], dataset, other, tmp_path)
    with pytest.raises(ValueError, match="model: "):
        evaluate(models["qwen-mha"], dataset, config, tmp_path)
    assert evaluate(models["qwen-gqa"], dataset, other, tmp_path, fresh=True).report["settings"]["temperature"] == 0.1


def test_models_without_heads_are_evaluated_on_their_other_features(model_folders, dataset, config, tmp_path):
    model = load_evaluated_model(model_folders["qwen-gqa"])
    report = evaluate(model, dataset, config, tmp_path).report
    assert report["features"] == "qk" and set(report["by_features"]) == {"qk", "hidden"} and report["heads"] is None
    with pytest.raises(ValueError, match="there are no heads"):
        evaluate(model, dataset, EvaluationConfig(data=dataset.config, features=("head",)), tmp_path / "b")


def test_the_report_is_strict_json(models, dataset, config, tmp_path):
    report = evaluate(models["llava"], dataset, config, tmp_path).report
    assert json.loads(json.dumps(report, allow_nan=False)) == report


@pytest.mark.alone
@pytest.mark.slow
def test_evaluating_28_layers_costs_at_most_a_third_of_a_forward_pass_more(tmp_path):
    """All kinds of features at once. Processor time, interleaved runs, the best of each: insensitive to other load."""
    folder = tiny.build_tiny(tmp_path / "model", tiny.TinyConfig(hidden_size=256, layers=28))
    model = load_evaluated_model(folder, initial_heads=True)
    list(render_scenes(tmp_path / "scenes", 1, config=SyntheticConfig(frames=12), workers=1))
    dataset = EvaluationSet(tmp_path / "scenes", EvaluationSetConfig(sequences=1, max_gap=10))
    batch = Collator(model.backbone, CollatorConfig(anchors="first"))([dataset.sample(0)])
    predictor = Predictor(model, KINDS, "before", temperature=0.07)

    def cost(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def bare() -> None:
        run_with_features(model, batch, lambda *_: None, (), "before")

    def ours() -> None:
        predictor.best_tokens(batch)

    bare(), ours()
    with_matching, bare_pass = (
        min(column) for column in zip(*((cost(ours), cost(bare)) for _ in range(3)), strict=True)
    )
    assert with_matching <= 1.3 * bare_pass, f"{with_matching:.2f} s against {bare_pass:.2f} s"


# ---- what cannot be evaluated ---------------------------------------------------------------------------------------


@pytest.fixture
def copied(library, tmp_path):
    return shutil.copytree(library, tmp_path / "scenes")


def truncate_depth(scene: Path) -> None:
    for path in (scene / "depth").iterdir():
        path.write_bytes(path.read_bytes()[:100])


def test_sequences_that_cannot_be_read_are_left_out_and_named(models, copied, dataset, config, tmp_path):
    damaged = EvaluationSet(copied, dataset.config)
    name = damaged.scene_entry(1).name
    truncate_depth(copied / name)
    report = evaluate(models["qwen-gqa"], damaged, config, tmp_path / "out").report
    left_out = report["unreadable"]["sequences"]
    assert [(one["sequence"], one["scene"]) for one in left_out] == [(1, name), (4, name)]
    assert all("depth" in one["reason"] and "\n" not in one["reason"] for one in left_out)
    assert report["sequences"] == 3 and report["sequences_without_tracks"] == 0
    # Once the file is restored, the next run evaluates them.
    shutil.rmtree(copied / name)
    shutil.copytree(dataset.library / name, copied / name)
    restored = evaluate(models["qwen-gqa"], EvaluationSet(copied, dataset.config), config, tmp_path / "out").report
    assert restored == evaluate(models["qwen-gqa"], dataset, config, tmp_path / "whole").report


def test_scenes_that_cannot_be_opened_are_left_out_and_named(models, copied, dataset, config, tmp_path):
    (copied / dataset.scene_entry(0).name / "meta.json").write_text("{")
    report = evaluate(models["qwen-gqa"], EvaluationSet(copied, dataset.config), config, tmp_path / "out").report
    assert list(report["unreadable"]["scenes"]) == [dataset.scene_entry(0).name] and len(report["scenes"]) == 2
    assert report["sequences"] == 5 and not report["unreadable"]["sequences"]


def test_a_refused_evaluation_leaves_nothing_that_refuses_the_next(models, copied, dataset, config, tmp_path):
    damaged = EvaluationSet(copied, dataset.config)
    for entry in damaged.scenes:
        truncate_depth(copied / entry.name)
    with pytest.raises(ValueError, match=r"5 of 5 sequences cannot be read.*depth"):
        evaluate(models["qwen-gqa"], damaged, config, tmp_path / "out")
    assert not list(tmp_path.glob("out/**/plan.json"))
    without_heads = replace(models["qwen-gqa"], heads=None)
    with pytest.raises(ValueError, match="heads"):
        evaluate(without_heads, dataset, replace(config, features=("head",)), tmp_path / "out")
    assert not list(tmp_path.glob("out/**/plan.json"))
    evaluate(models["qwen-gqa"], dataset, config, tmp_path / "out")


def with_nan_head(model, layer: int):
    """The model with NaN in the head of one layer."""
    heads = copy.deepcopy(model.heads)
    with torch.no_grad():
        heads.by_layer[str(layer)].first.weight[0, 0] = torch.nan
    return replace(model, heads=heads)


def test_a_layer_with_nan_has_no_metrics_and_the_others_keep_theirs(models, dataset, config, tmp_path):
    sound = evaluate(models["qwen-gqa"], dataset, config, tmp_path / "a").report["by_features"]
    damaged = evaluate(with_nan_head(models["qwen-gqa"], 1), dataset, config, tmp_path / "b").report["by_features"]
    assert damaged["qk"] == sound["qk"] and damaged["hidden"] == sound["hidden"]
    for metric in ("pck", "pck_moved", "rho", "calibration_gap"):
        expected = list(sound["head"][metric]["per_layer"])
        expected[1] = None
        assert damaged["head"][metric]["per_layer"] == expected
    others = [pck for n, pck in enumerate(sound["head"]["pck"]["per_layer"]) if n != 1]
    assert damaged["head"]["pck"]["mean"] == pytest.approx(np.mean(others))
    assert damaged["head"]["pck"]["peak"] == max(others) and damaged["head"]["pck"]["peak_layer"] != 2


def test_a_model_that_gives_only_nan_is_refused(models, dataset, config, tmp_path):
    model = models["qwen-gqa"]
    for layer in range(4):
        model = with_nan_head(model, layer)
    with pytest.raises(ValueError, match=r"qwen-gqa: the features 'head' of every layer are NaN or infinite"):
        evaluate(model, dataset, config, tmp_path)
    assert not list(tmp_path.glob("**/plan.json"))


def test_recorded_scenes_can_be_evaluated(models, recorded, tmp_path):
    """Photographs with missing depth, cropped by LLaVA's processor."""
    root: Path = recorded("hololens_dvmvs_a")
    dataset = EvaluationSet(root, EvaluationSetConfig(sequences=2, frames=4))
    report = evaluate(
        models["llava"], dataset, EvaluationConfig(data=dataset.config, features=("hidden",)), tmp_path
    ).report
    assert report["sequences"] == 2 and 0 < report["identity"] < 1

"""The whole way: a real tiny model is asked about rendered scenes, and every figure equals loops in float64."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation import brute_force

from gasp_fast.backbones import tiny
from gasp_fast.collator import Collator, CollatorConfig
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes
from gasp_fast.evaluation.evaluate import EvaluationConfig, _Asker, evaluate, heat_maps, run_features
from gasp_fast.evaluation.features import KINDS, layers_of
from gasp_fast.evaluation.sampling import QuestionConfig, Questions
from gasp_fast.evaluation.subject import open_subject
from gasp_fast.supervision.head_files import write_heads


@pytest.fixture
def config(questions):
    return EvaluationConfig(questions=questions.config, batch=2)


@pytest.mark.parametrize("rope", ["before", "after"])
def test_every_figure_of_a_real_model_equals_brute_force(subject, questions, rope, tmp_path):
    config = EvaluationConfig(questions=questions.config, batch=2, rope=rope)
    report = evaluate(subject, questions, config, tmp_path).report
    collator = Collator(subject.backbone, CollatorConfig(anchors="first"))
    right: dict = {}  # (kind, layer) -> a list for each sequence
    sure: dict = {}
    gaps, moved = [], []
    for index in range(len(questions)):
        batch, frames = collator([questions.sample(index)]), questions.frames(index)
        matches, xy = batch["matches"], batch["matches"].token_xy
        frame = torch.bucketize(matches.target, matches.frame_offsets, right=True) - 1
        gaps.append([frames[f] - frames[0] for f in frame.tolist()])
        offset = (xy[matches.anchor] - xy[matches.target]).double().norm(dim=1)
        moved.append((offset > 2).tolist())
        found: dict = {}
        run_features(
            subject, batch, lambda kind, layer, q, k, to=found: to.update({(kind, layer): (q, k)}), KINDS, rope
        )
        for key, (queries, keys) in found.items():
            _, confidence, correct = brute_force.answers(queries, keys, matches, 0.07)
            right.setdefault(key, []).append(correct)
            sure.setdefault(key, []).append(confidence)
    assert sum(map(len, gaps)) > 100 and any(map(any, moved))
    for kind in KINDS:
        figures = report["by_features"][kind]
        for layer in range(4):
            pck = [brute_force.mean(one) for one in right[kind, layer]]
            assert figures["pck"]["per_layer"][layer] == pytest.approx(brute_force.mean(pck))
            assert figures["pck"]["per_layer_std"][layer] == pytest.approx(brute_force.deviation(pck))
            pairs = zip(right[kind, layer], moved, strict=True)
            of_moved = [[r for r, m in zip(*pair, strict=True) if m] for pair in pairs]
            expected = brute_force.mean([brute_force.mean(one) for one in of_moved if one])
            assert figures["pck_moved"]["per_layer"][layer] == pytest.approx(expected)
            flat_sure, flat_right = list(chain(*sure[kind, layer])), list(chain(*right[kind, layer]))
            expected = brute_force.pearson(flat_sure, flat_right)
            assert figures["rho"]["per_layer"][layer] == pytest.approx(expected, abs=1e-4)
            by_sort = [[s for s, r in zip(flat_sure, flat_right, strict=True) if r == sort] for sort in (True, False)]
            expected = brute_force.mean(by_sort[0]) - brute_force.mean(by_sort[1])
            assert figures["calibration_gap"]["per_layer"][layer] == pytest.approx(expected, abs=1e-5)
        per_gap = [
            brute_force.mean([r for r, g in zip(r1, g1, strict=True) if g == 1])
            for r1, g1 in zip(right[kind, figures["pck"]["peak_layer"] - 1], gaps, strict=True)
            if 1 in g1
        ]
        assert figures["temporal"]["pck"][0] == pytest.approx(brute_force.mean(per_gap))
        assert figures["identity"] == pytest.approx(brute_force.mean([1 - brute_force.mean(one) for one in moved]))
    assert {key: report[key] for key in ("sequences", "frames", "grid", "features")} == {
        "sequences": 5, "frames": 4, "grid": 5, "features": "head",
    }  # fmt: skip


def test_answers_do_not_depend_on_how_many_are_asked_at_once(subjects, questions, tmp_path):
    reports = [
        evaluate(
            subjects["qwen-gqa"], questions, EvaluationConfig(questions=questions.config, batch=n), tmp_path / f"{n}"
        )
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


def test_a_stopped_evaluation_goes_on_where_it_was(subjects, questions, config, tmp_path):
    subject = subjects["qwen-gqa"]
    whole = evaluate(subject, questions, config, tmp_path / "whole").report

    def kill(done: int, total: int) -> None:
        if done >= 2:
            raise _Killed

    with pytest.raises(_Killed):
        evaluate(subject, questions, config, tmp_path / "part", progress=kill)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "part" / "answers").glob("*.npz")}
    assert sorted(kept) == ["00000.npz", "00001.npz"]
    seen: list[tuple[int, int]] = []
    resumed = evaluate(subject, questions, config, tmp_path / "part", progress=lambda *pair: seen.append(pair)).report
    assert seen[0] == (2, 5) and seen[-1] == (5, 5)
    assert resumed == whole
    for name, time_before in kept.items():
        assert (tmp_path / "part" / "answers" / name).stat().st_mtime_ns == time_before


def test_a_damaged_answer_is_made_again(subjects, questions, config, tmp_path):
    subject = subjects["qwen-gqa"]
    whole = evaluate(subject, questions, config, tmp_path).report
    broken = tmp_path / "answers" / "00003.npz"
    broken.write_bytes(broken.read_bytes()[:100])
    assert evaluate(subject, questions, config, tmp_path).report == whole


def test_other_settings_do_not_mix_with_old_answers(subjects, questions, config, tmp_path):
    evaluate(subjects["qwen-gqa"], questions, config, tmp_path)
    other = EvaluationConfig(questions=questions.config, temperature=0.1)
    with pytest.raises(ValueError, match=r"temperature: 0.07 there, 0.1 now.*--fresh"):
        evaluate(subjects["qwen-gqa"], questions, other, tmp_path)
    with pytest.raises(ValueError, match="model: "):
        evaluate(subjects["qwen-mha"], questions, config, tmp_path)
    assert (
        evaluate(subjects["qwen-gqa"], questions, other, tmp_path, fresh=True).report["settings"]["temperature"] == 0.1
    )


def test_retrained_weights_in_the_same_folder_are_another_model(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["qwen-gqa"], tmp_path / "model")
    before = open_subject(folder).fingerprint
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert open_subject(folder).fingerprint != before


def test_questions_are_reproducible_ascending_and_within_reach(library):
    config = QuestionConfig(sequences=60, frames=5, max_gap=10)
    first, second = Questions(library, config), Questions(library, config)
    gaps: list[int] = []
    for index in range(60):
        frames = first.frames(index)
        assert frames == second.frames(index)
        assert len(set(frames)) == 5 and list(frames) == sorted(frames) and frames[0] >= 0 and frames[-1] < 16
        gaps += [f - frames[0] for f in frames[1:]]
    counts = np.bincount(gaps, minlength=11)
    assert counts[0] == 0 and len(counts) == 11
    assert counts[1:].min() >= 10  # 24 on average: every gap has its share
    assert {first.scene_entry(index).name for index in range(3)} == {entry.name for entry in first.scenes}


def test_only_held_out_scenes_are_asked_about(library):
    from gasp_fast.data.tracks.sequences import is_held_out

    names = sorted(path.name for path in library.iterdir() if path.is_dir())
    share = next(s / 100 for s in range(1, 100) if 0 < sum(is_held_out(n, s / 100) for n in names) < len(names))
    asked = {entry.name for entry in Questions(library, QuestionConfig(sequences=5, frames=4, held_out=share)).scenes}
    assert asked == {name for name in names if is_held_out(name, share)}


def test_models_without_heads_are_evaluated_by_what_they_have(model_folders, questions, config, tmp_path):
    subject = open_subject(model_folders["qwen-gqa"])
    report = evaluate(subject, questions, config, tmp_path).report
    assert report["features"] == "qk" and set(report["by_features"]) == {"qk", "hidden"} and report["heads"] is None
    with pytest.raises(ValueError, match="there are no heads"):
        evaluate(subject, questions, EvaluationConfig(questions=questions.config, features=("head",)), tmp_path / "b")


def test_heads_beside_a_checkpoint_are_found_and_are_the_same(subjects, model_folders, tmp_path):
    heads = subjects["qwen-gqa"].heads
    run = tmp_path / "run"
    for number, shift in ((9, 1.0), (10, 0.0)):  # the last checkpoint by number, not by name
        folder = shutil.copytree(model_folders["qwen-gqa"], run / f"checkpoint-{number}")
        write_heads(folder / "heads.safetensors", {k: v + shift for k, v in heads.state_dict().items()}, "fp32")
    subject = open_subject(run)
    assert subject.heads_origin == "trained" and subject.name == "run"
    assert all(torch.equal(v, heads.state_dict()[k]) for k, v in subject.heads.state_dict().items())
    assert open_subject(model_folders["qwen-gqa"]).heads is None


def test_heads_of_another_model_are_refused(subjects, tmp_path):
    folder = tiny.build_tiny(tmp_path / "small", tiny.TinyConfig(hidden_size=64, frame_size=112))
    write_heads(folder / "heads.safetensors", subjects["qwen-gqa"].heads.state_dict(), "fp32")
    with pytest.raises(ValueError, match="they belong to another model"):
        open_subject(folder)


def test_an_adapter_counts_in_what_is_measured(model_folders, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = open_subject(model_folders["qwen-gqa"])
    adapted = get_peft_model(
        base.backbone.load_model(dtype=torch.float32),
        LoraConfig(r=4, target_modules=base.backbone.lora_targets, init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    subject = open_subject(tmp_path / "adapter")
    before, after = (base.backbone.query_projection(one.model, 1)[0] for one in (base, subject))
    low_rank = adapted.get_base_model().model.language_model.layers[1].self_attn.q_proj
    assert torch.allclose(after - before, low_rank.get_delta_weight("default"), atol=1e-6)
    assert (after - before).abs().max() > 1e-3


def test_a_heat_map_is_the_softmax_of_one_row(subjects, questions):
    subject, sample = subjects["qwen-gqa"], questions.sample(0)
    maps = heat_maps(subject, sample, "qk", 2, 8, "before", 0.07)
    batch = Collator(subject.backbone, CollatorConfig(anchors="first"))([sample])
    found: dict = {}
    run_features(subject, batch, lambda kind, layer, q, k: found.update({layer: (q, k)}), ["qk"], "before")
    queries, keys = found[2]
    row = torch.nn.functional.cosine_similarity(queries[8:9], keys) / 0.07
    assert len(maps) == 4 and maps[0].shape == (7, 7)
    for f, one in enumerate(maps):
        assert np.allclose(one.ravel(), row[49 * f : 49 * (f + 1)].softmax(0), atol=1e-5)


def test_the_report_is_strict_json(subjects, questions, config, tmp_path):
    report = evaluate(subjects["llava"], questions, config, tmp_path).report
    assert json.loads(json.dumps(report, allow_nan=False)) == report


@pytest.mark.alone
@pytest.mark.slow
def test_evaluating_28_layers_costs_at_most_a_third_of_a_forward_pass_more(tmp_path):
    """All kinds of features at once. By processor time, runs interleaved, the best of each: what other processes do
    must not count."""
    folder = tiny.build_tiny(tmp_path / "model", tiny.TinyConfig(hidden_size=256, layers=28))
    subject = open_subject(folder, initial_heads=True)
    list(render_scenes(tmp_path / "scenes", 1, config=SyntheticConfig(frames=12), workers=1))
    questions = Questions(tmp_path / "scenes", QuestionConfig(sequences=1, max_gap=10))
    batch = Collator(subject.backbone, CollatorConfig(anchors="first"))([questions.sample(0)])
    layers = {kind: layers_of(kind, subject.backbone, subject.heads) for kind in KINDS}
    asker = _Asker(subject, EvaluationConfig(questions=questions.config), KINDS, layers)

    def cost(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def bare() -> None:
        run_features(subject, batch, lambda *_: None, (), "before")

    def ours() -> None:
        asker._run(batch)

    bare(), ours()
    spent, least = (min(column) for column in zip(*((cost(ours), cost(bare)) for _ in range(3)), strict=True))
    assert spent <= 1.3 * least, f"{spent:.2f} s against {least:.2f} s"


def test_recorded_frames_can_be_asked_about(subjects, recorded, tmp_path):
    """Real photographs with holes in their depth, LLaVA's crop included."""
    root: Path = recorded("hololens_dvmvs_a")
    questions = Questions(root, QuestionConfig(sequences=2, frames=4))
    report = evaluate(
        subjects["llava"], questions, EvaluationConfig(questions=questions.config, features=("hidden",)), tmp_path
    ).report
    assert report["sequences"] == 2 and 0 < report["identity"] < 1

"""What a page points at: exact answers, true positions, and heat within a few percent of the exact probabilities."""

from __future__ import annotations

import base64
import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from gasp_fast.backbones import TokenGrid
from gasp_fast.collator import Collator, CollatorConfig
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes
from gasp_fast.data.tracks.build import build_tracks
from gasp_fast.evaluation.dataset import EvaluationSet, EvaluationSetConfig
from gasp_fast.evaluation.evaluate import EvaluationConfig, evaluate
from gasp_fast.evaluation.features import run_with_features
from gasp_fast.evaluation.pointing import (
    LARGEST,
    NOWHERE,
    ShownFrames,
    evenly,
    factors,
    pointing_data,
    storage_plan,
)
from gasp_fast.evaluation.pointing_page import page_data, read_pointing
from gasp_fast.evaluation.report import read_report

FRAMES = 6


@pytest.fixture(scope="module")
def data(library) -> EvaluationSet:
    return EvaluationSet(library, EvaluationSetConfig(sequences=6, frames=FRAMES, grid=5, max_gap=8))


@pytest.fixture(scope="module", params=["qwen-gqa", "llava"])
def pointed(request, models, data, tmp_path_factory):
    """A model, its evaluation, and the sequences to point at."""
    model = models[request.param]
    config = EvaluationConfig(data=data.config, batch=3)
    evaluation = evaluate(model, data, config, tmp_path_factory.mktemp(request.param))
    return model, evaluation, pointing_data(model, data, config, evaluation, 2)


def numbers(text: str, kind: str, columns: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind).reshape(-1, columns)


def index_of(data: EvaluationSet, sequence: dict) -> int:
    """The sequence of the evaluation that is shown."""
    (index,) = (
        index
        for index in range(len(data))
        if data.scene_entry(index).name == sequence["scene"] and set(sequence["frames"]) <= set(data.frames(index))
    )
    return index


def tokens_of(model) -> tuple[int, int]:
    grid = model.backbone.frame_grid(112, 112)
    return grid.tokens, grid.columns


def test_answers_are_the_most_similar_tokens_and_those_of_the_report(pointed, data):
    """Of every token of the first frame, from float64 cosines."""
    model, evaluation, content = pointed
    per_frame, _ = tokens_of(model)
    compared = 0
    for sequence in content["sequences"]:
        index = index_of(data, sequence)
        places = [data.frames(index).index(frame) for frame in sequence["frames"]]
        assert places == [0, 1, 2, 4, 5]  # evenly among five later frames
        features: dict = {}
        batch = Collator(model.backbone, CollatorConfig(anchors="first"))([data.sample(index)])
        run_with_features(
            model, batch, lambda kind, layer, q, k, to=features: to.update({(kind, layer): (q, k)}),
            ("head", "qk", "hidden"), "before",
        )  # fmt: skip
        for (kind, layer), (queries, keys) in features.items():
            stored = sequence["features"][kind][str(layer + 1)]
            best = numbers(stored["best"], "<u2", 4)
            similarity = torch.nn.functional.cosine_similarity(
                queries[:per_frame, None].double(), keys[None].double(), dim=-1
            )
            exact = torch.stack([similarity[:, per_frame * f : per_frame * (f + 1)] for f in places[1:]], 1)
            assert (exact.argmax(2).numpy() == best).mean() > 0.999
            check_heat(stored, exact.numpy(), best)
            predictions = evaluation.predictions[index]
            for m, (anchor, target) in enumerate(zip(predictions.anchor, predictions.target, strict=True)):
                if (frame := target // per_frame) in places:
                    answer = predictions.best[kind][layer, m] - frame * per_frame
                    assert best[anchor, places.index(frame) - 1] == answer
                    compared += 1
    assert compared > 500


def check_heat(stored: dict, exact: np.ndarray, best: np.ndarray) -> None:
    """The probabilities that the page draws, and how often they are highest at the answer."""
    count = len(stored["scale"])
    queries, keys = (numbers(stored[name], "i1", count).astype(float) for name in ("queries", "keys"))
    drawn = ((queries * stored["scale"]) @ keys.T).reshape(exact.shape)  # [T, F, tokens]
    assert stored["agreement"] == pytest.approx((drawn.argmax(2) == best).mean(), abs=2e-3)
    assert stored["agreement"] > 0.85
    ours, theirs = (np.exp(one / 0.07 - (one / 0.07).max(2, keepdims=True)) for one in (drawn, exact))
    ours, theirs = (one / one.sum(2, keepdims=True) for one in (ours, theirs))
    assert np.abs(ours - theirs).sum(2).mean() / 2 < 0.05  # random weights: similarities of full rank, the worst case


def test_true_tokens_are_those_of_the_evaluation_and_elsewhere_of_tracks(pointed, data):
    model, evaluation, content = pointed
    per_frame, columns = tokens_of(model)
    for sequence in content["sequences"]:
        index = index_of(data, sequence)
        places = [data.frames(index).index(frame) for frame in sequence["frames"]]
        truth, matches = numbers(sequence["truth"], "<u2", 4), numbers(sequence["matches"], "<u2", 3)
        predictions = evaluation.predictions[index]
        expected = {
            (int(anchor), places.index(target // per_frame) - 1, int(target % per_frame))
            for anchor, target in zip(predictions.anchor, predictions.target, strict=True)
            if target // per_frame in places
        }
        assert expected == set(map(tuple, matches.tolist()))
        assert all(
            truth[anchor, frame] in {t for a, f, t in expected if (a, f) == (anchor, frame)}
            for anchor, frame, _ in expected
        )
        grid = model.backbone.frame_grid(112, 112)
        tracks = build_tracks(data.scene(index), sequence["frames"], grid=columns, keep=1.0)
        others = 0
        for point in range(len(tracks)):
            anchor = int(grid.locate(tracks.query[point]))
            if anchor in {a for a, _, _ in expected}:
                continue
            for frame in range(4):
                token = int(grid.locate(tracks.uv[point, frame + 1])) if tracks.visible[point, frame + 1] else -1
                assert truth[anchor, frame] == (token if token >= 0 else NOWHERE)
                others += token >= 0
        assert others > 20


def test_all_models_show_the_same_sequences_from_other_scenes(models, data, tmp_path):
    shown = []
    for name in ("qwen-gqa", "qwen-mha", "llava"):
        config = EvaluationConfig(data=data.config, features=("hidden",))
        evaluation = evaluate(models[name], data, config, tmp_path / name)
        content = pointing_data(models[name], data, config, evaluation, 3)
        shown.append([(one["scene"], one["frames"]) for one in content["sequences"]])
    assert shown[0] == shown[1] == shown[2]
    assert len({scene for scene, _ in shown[0]}) == 3


def test_frames_that_are_not_square_and_cropped_keep_their_points(models, tmp_path):
    """LLaVA's processor cuts the sides off: the rectangle of the tokens is inside the frame."""
    list(render_scenes(tmp_path / "wide", 2, config=SyntheticConfig(frames=10, width=160, height=96), workers=1))
    wide = EvaluationSet(tmp_path / "wide", EvaluationSetConfig(sequences=2, frames=3, grid=5, max_gap=6))
    config = EvaluationConfig(data=wide.config, features=("hidden",))
    evaluation = evaluate(models["llava"], wide, config, tmp_path / "out")
    (sequence,) = pointing_data(models["llava"], wide, config, evaluation, 1)["sequences"]
    columns, rows, left, top, right, bottom = sequence["grids"][0]
    assert sequence["size"] == [160, 96] and columns == rows
    assert left == pytest.approx(0.2, abs=0.01) and right == pytest.approx(0.8, abs=0.01) and (top, bottom) == (0, 1)


@pytest.mark.parametrize("rank", [3, 40])
def test_factors_are_whole_numbers_whose_product_is_near_the_matrix(rank):
    generator = torch.Generator().manual_seed(1)
    scales = torch.logspace(0, -2, rank)
    matrix = (torch.randn(60, rank, generator=generator) * scales) @ torch.randn(rank, 200, generator=generator)
    left, right, scale = factors(matrix, 32)
    assert left.shape == (60, 32) and right.shape == (200, 32)
    for one in (left, right):
        assert torch.equal(one, one.round()) and one.abs().max() <= 127
    error = ((left * scale) @ right.T - matrix).norm() / matrix.norm()
    plain = torch.linalg.svdvals(matrix)
    assert error < 1.25 * plain[32:].norm() / plain.norm() + 1e-3


def test_few_tokens_and_a_constant_matrix_are_no_problem():
    left, right, scale = factors(torch.zeros(4, 12), 32)
    assert left.shape == (4, 8) and torch.equal((left * scale) @ right.T, torch.zeros(4, 12))


@pytest.mark.parametrize(
    ("rows", "columns", "layers", "components", "kept"),
    [(14, 14, 4, 32, 4), (12, 12, 28, 16, 14), (24, 24, 28, 8, 6), (64, 96, 28, 0, 0)],
)
def test_what_is_stored_fits_whatever_the_model(rows, columns, layers, components, kept):
    """Three kinds of features, three sequences: a tiny model, LLaVA-NeXT-Video, Qwen2.5-VL-7B, and too many tokens."""
    grid = TokenGrid(columns, rows, 0, 0, 1, 1)
    shown = ShownFrames(np.arange(5), np.arange(5) * grid.tokens, [grid] * 5)
    kinds = {kind: list(range(layers)) for kind in ("head", "qk", "hidden")}
    plan = storage_plan([shown] * 3, kinds)
    if not kept:
        assert plan is None
        return
    assert plan.components == components and all(len(chosen) == kept for chosen in plan.layers.values())
    assert plan.layers["qk"][-1] == layers - 1
    assert 9 * kept * (components * 5 * grid.tokens + 2 * grid.tokens * 4) <= LARGEST


def test_layers_are_left_out_evenly():
    assert evenly(range(28), 4) == [6, 13, 20, 27] and evenly([3, 5], 9) == [3, 5] and evenly(range(9), 1) == [8]


# ---- the data of a page ---------------------------------------------------------------------------------------------


@pytest.fixture
def read(compared):
    names = ("before", "after")
    return {name: read_report(compared / name) for name in names}, {n: read_pointing(compared / n) for n in names}


def test_a_page_of_two_models_has_the_sequences_of_both_and_the_best_layer_of_the_last(read):
    reports, pointings = read
    data, note = page_data(reports, copy.deepcopy(pointings))
    assert [one["name"] for one in data["models"]] == ["before", "after"] and not note
    assert len(data["sequences"]) == 2 and all(len(one["models"]) == 2 for one in data["sequences"])
    assert {kind: one["layers"] for kind, one in data["kinds"].items()} == {"head": [1, 2, 3, 4], "qk": [1, 2, 3, 4]}
    assert data["layer"] == reports["after"]["pck"]["peak_layer"] and 0.9 < data["agreement"] <= 1


def test_reports_without_the_data_are_named_and_the_others_shown(read):
    reports, pointings = read
    data, note = page_data(reports, {"after": pointings["after"]})
    assert [one["name"] for one in data["models"]] == ["after"]
    assert note == "Without features to point at: before; run gasp-fast evaluate on them again."
    assert page_data(reports, {})[0] is None


def test_reports_on_other_sequences_share_nothing_to_point_at(read):
    reports, pointings = read
    for one in pointings["after"]["sequences"]:
        one["scene"] = "elsewhere"
    data, note = page_data(reports, pointings)
    assert data is None and "share no sequences" in note


def test_a_page_of_many_models_has_fewer_layers_and_stays_small(read):
    report, pointing = read[0]["after"], read[1]["after"]
    size = len(json.dumps(pointing))
    many = 5_000_000 // size + 10
    names = [f"model {n}" for n in range(many)]
    data, _ = page_data(dict.fromkeys(names, report), {name: copy.deepcopy(pointing) for name in names})
    assert 1 <= len(data["kinds"]["head"]["layers"]) < 4 and data["kinds"]["head"]["layers"][-1] == 4
    assert len(json.dumps(data)) < 5_000_000


def test_a_damaged_file_is_one_line_that_names_it(compared, tmp_path):
    content = json.loads((compared / "before" / "pointing.json").read_text())
    path = tmp_path / "pointing.json"
    for damage in (
        lambda one: one["features"]["head"]["1"].update(queries="AAAA"),
        lambda one: one["features"]["head"]["2"].update(best=base64.b64encode(b"\xff" * 392).decode()),
        lambda one: one.update(truth="?"),
        lambda one: one["grids"][0].__setitem__(0, 10**9),
        lambda one: one["features"].update({"<b>": {}}),
    ):
        damaged = copy.deepcopy(content)
        damage(damaged["sequences"][0])
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=rf"{path}: damaged .*run gasp-fast evaluate again") as caught:
            read_pointing(tmp_path)
        assert "\n" not in str(caught.value)
    assert read_pointing(tmp_path / "nowhere") is None


def test_without_sequences_or_the_forward_direction_there_is_nothing_to_point_at(models, data, tmp_path):
    config = EvaluationConfig(data=data.config, features=("hidden",), direction="causal")
    evaluation = evaluate(models["llava"], data, config, tmp_path)
    assert pointing_data(models["llava"], data, config, evaluation, 3) is None
    forward = replace(config, direction="both")
    evaluation = evaluate(models["llava"], data, forward, tmp_path / "both")
    assert pointing_data(models["llava"], data, forward, evaluation, 0) is None
    content = pointing_data(models["llava"], data, forward, evaluation, 1)
    assert list(content["sequences"][0]["features"]) == ["hidden"]

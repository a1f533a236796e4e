"""Directions, head groups, confidence of attention, radius and token grids of whole evaluations equal brute force."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from evaluation import brute_force

from gasp_fast import Matches
from gasp_fast.collator import Collator, CollatorConfig
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes
from gasp_fast.data.tracks.build import build_tracks
from gasp_fast.evaluation.dataset import EvaluationSet, EvaluationSetConfig
from gasp_fast.evaluation.evaluate import EvaluationConfig, evaluate
from gasp_fast.evaluation.features import KINDS, run_with_features


@pytest.fixture
def config(dataset) -> Callable[..., EvaluationConfig]:
    return lambda **options: EvaluationConfig(data=dataset.config, batch=2, **options)


@pytest.fixture(scope="module")
def oblong(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSet:
    """Wide and tall frames, of which LLaVA's processor cuts off the sides, or top and bottom."""
    root = tmp_path_factory.mktemp("oblong")
    for name, width, height in (("wide", 160, 96), ("tall", 96, 160)):
        list(render_scenes(root / name, 1, config=SyntheticConfig(frames=10, width=width, height=height), workers=1))
    return EvaluationSet(root, EvaluationSetConfig(sequences=4, frames=4, grid=5, max_gap=8))


def collated(model, dataset, index: int) -> dict[str, Any]:
    return Collator(model.backbone, CollatorConfig(anchors="first"))([dataset.sample(index)])


def swapped(matches: Matches) -> Matches:
    """The same correspondences, asked from the later frame."""
    return Matches(
        frame_offsets=matches.frame_offsets, anchor=matches.target, target=matches.anchor, token_xy=matches.token_xy
    )


def captured(model, batch: dict[str, Any], kinds=KINDS) -> dict[tuple[str, int], Any]:
    features: dict[tuple[str, int], Any] = {}
    run_with_features(model, batch, lambda kind, layer, q, k: features.update({(kind, layer): (q, k)}), kinds, "before")
    return features


def projections(model, batch: dict[str, Any]) -> dict[tuple[int, str], torch.Tensor]:
    """Outputs of each layer's query and key projections, `[S, heads * width]`."""
    states: dict[tuple[int, str], torch.Tensor] = {}
    hooks = [
        getattr(model.backbone.attention(model.model, layer), name).register_forward_hook(
            lambda module, args, out, key=(layer, name): states.update({key: out[0]})
        )
        for layer in range(4)
        for name in ("q_proj", "k_proj")
    ]
    captured(model, batch, ())
    for hook in hooks:
        hook.remove()
    return states


def attention_probability(q: torch.Tensor, k: torch.Tensor, asked: int, frame: range, token: int, width: int) -> float:
    """Of a token among those of a frame: softmax of the mean over heads of `q.k / sqrt(d)`, in loops."""
    heads = [slice(start, start + width) for start in range(0, q.shape[1], width)]
    logits = {
        one: brute_force.mean([float(q[asked, head] @ k[one, head]) / math.sqrt(width) for head in heads])
        for one in frame
    }
    return math.exp(logits[token]) / sum(map(math.exp, logits.values()))


def test_in_the_causal_direction_the_later_frame_gives_the_query(model, dataset, config, tmp_path):
    report = evaluate(model, dataset, config(direction="both"), tmp_path).report
    assert list(report["by_features"]) == ["head", "head-causal", "qk", "qk-causal", "hidden", "hidden-causal"]
    batches = [collated(model, dataset, index) for index in range(len(dataset))]
    features = [captured(model, batch) for batch in batches]
    different = 0
    for kind in KINDS:
        forward, causal = report["by_features"][kind], report["by_features"][f"{kind}-causal"]
        for layer in range(4):
            answers = [
                brute_force.predictions(*of_sequence[kind, layer], swapped(batch["matches"]), 0.07)
                for batch, of_sequence in zip(batches, features, strict=True)
            ]
            expected = brute_force.mean([brute_force.mean(correct) for _, _, correct in answers])
            assert causal["pck"]["per_layer"][layer] == pytest.approx(expected)
            confidence = list(chain(*(one for _, one, _ in answers)))
            rho = brute_force.pearson(confidence, list(chain(*(correct for _, _, correct in answers))))
            assert causal["rho"]["per_layer"][layer] == pytest.approx(rho, abs=1e-4)
            different += causal["pck"]["per_layer"][layer] != forward["pck"]["per_layer"][layer]
        assert causal["identity"] == pytest.approx(forward["identity"])
        assert causal["pck_moved"]["share"] == forward["pck_moved"]["share"]
    assert different >= 6


def test_a_causal_evaluation_alone_leads_with_the_causal_direction(models, dataset, config, tmp_path):
    both = evaluate(models["llava"], dataset, config(direction="both"), tmp_path / "both").report
    alone = evaluate(models["llava"], dataset, config(direction="causal"), tmp_path / "alone").report
    assert alone["features"] == "head-causal" and list(alone["by_features"]) == [f"{kind}-causal" for kind in KINDS]
    for name, metrics in alone["by_features"].items():
        assert metrics == both["by_features"][name]


def test_each_head_group_is_a_key_head_with_the_mean_of_its_query_heads(model, dataset, config, tmp_path):
    report = evaluate(model, dataset, config(features=("qk",)), tmp_path).report["by_features"]["qk"]
    shape = model.backbone.attention_shape
    shared = shape.query_heads // shape.key_heads
    pck: dict[tuple[int, int], list[float]] = {}
    for index in range(len(dataset)):
        batch = collated(model, dataset, index)
        states = projections(model, batch)
        tokens = batch["visual_positions"]
        for layer in range(4):
            for group in range(shape.key_heads):
                width, heads = shape.head_dim, range(group * shared, (group + 1) * shared)
                query = states[layer, "q_proj"][tokens]
                queries = sum(query[:, head * width : (head + 1) * width] for head in heads) / shared
                keys = states[layer, "k_proj"][tokens][:, group * width : (group + 1) * width]
                _, _, correct = brute_force.predictions(queries, keys, batch["matches"], 0.07)
                pck.setdefault((layer, group), []).append(brute_force.mean(correct))
    means = {key: brute_force.mean(values) for key, values in pck.items()}
    groups = report["pck_groups"]
    assert np.shape(groups["per_layer"]) == (4, shape.key_heads)
    for (layer, group), value in means.items():
        assert groups["per_layer"][layer][group] == pytest.approx(value)
    assert groups["peak"] == pytest.approx(max(means.values()))
    assert means[groups["peak_layer"] - 1, groups["peak_group"] - 1] == pytest.approx(groups["peak"])
    expected = brute_force.mean([means[2, group] for group in range(shape.key_heads)])
    assert groups["mean_per_layer"][2] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["qwen-gqa", "llava"])
def test_confidence_of_attention_is_a_softmax_of_scaled_products(models, dataset, config, name, tmp_path):
    """Where heads are compared side by side, of the mean of their products."""
    model = models[name]
    evaluation = evaluate(model, dataset, config(confidence="attention", direction="both"), tmp_path / "attention")
    cosine = evaluate(model, dataset, config(direction="both"), tmp_path / "cosine")
    width = model.backbone.attention_shape.head_dim
    for index in range(2):
        batch = collated(model, dataset, index)
        matches = batch["matches"]
        offsets = matches.frame_offsets.tolist()
        for measured, one in (("qk", matches), ("qk-causal", swapped(matches))):
            predictions = evaluation.predictions[index]
            assert np.array_equal(predictions.best[measured], cosine.predictions[index].best[measured])
            for layer in range(4):
                queries, keys = (x.double() for x in captured(model, batch)["qk", layer])
                for m in range(4):
                    asked, true = int(one.anchor[m]), int(one.target[m])
                    frame = next(range(a, b) for a, b in pairwise(offsets) if a <= true < b)
                    token = int(predictions.best[measured][layer, m])
                    expected = attention_probability(queries, keys, asked, frame, token, width)
                    assert predictions.confidence[measured][layer, m] == pytest.approx(expected, rel=1e-4)
    first, second = evaluation.report["by_features"], cosine.report["by_features"]
    assert first["head"] == second["head"] and first["qk"]["pck"] == second["qk"]["pck"]
    assert first["qk"]["rho"] != second["qk"]["rho"]


@pytest.mark.parametrize("radius", [1, 3.5])
def test_another_radius_scores_the_same_predictions_again(models, dataset, config, radius, tmp_path):
    model, kinds = models["qwen-gqa"], ("hidden",)
    before = evaluate(model, dataset, config(features=kinds), tmp_path).report
    seen: list[tuple[int, int]] = []
    options = config(features=kinds, radius=radius)
    report = evaluate(model, dataset, options, tmp_path, progress=lambda *pair: seen.append(pair)).report
    assert seen[0] == (5, 5)  # nothing is predicted again
    assert before["settings"]["radius"] == 2 and report["settings"]["radius"] == radius
    pck, still = [], []
    for index in range(len(dataset)):
        batch = collated(model, dataset, index)
        matches = batch["matches"]
        queries, keys = captured(model, batch)["hidden", 3]
        pck.append(brute_force.mean(brute_force.predictions(queries, keys, matches, 0.07, radius)[2]))
        offset = (matches.token_xy[matches.anchor] - matches.token_xy[matches.target]).double().norm(dim=1)
        still.append(brute_force.mean((offset <= radius).tolist()))
    assert report["pck"]["per_layer"][3] == pytest.approx(brute_force.mean(pck))
    assert report["identity"] == pytest.approx(brute_force.mean(still))


def test_delta_avg_is_measured_from_where_the_points_really_are(model, oblong, tmp_path):
    """Tracks in pixels of the frame, centres of tokens, both on a frame of 256 x 256."""
    dataset = oblong
    config = EvaluationConfig(data=dataset.config, features=("hidden",), direction="both")
    evaluation = evaluate(model, dataset, config, tmp_path)
    for name, asked_first in (("hidden", True), ("hidden-causal", False)):
        shares, ceilings = [], []
        for index, predictions in enumerate(evaluation.predictions):
            frames = dataset.frames(index)
            tracks = build_tracks(dataset.scene(index), frames, grid=5, keep=1.0)
            images = [dataset.scene(index).image(frame) for frame in frames]
            grids = [model.backbone.frame_grid(image.shape[1], image.shape[0]) for image in images]
            starts = [sum(grid.tokens for grid in grids[:f]) for f in range(len(grids))]

            def distance(token: int, frame: int, uv, grids=grids, images=images, starts=starts) -> float:
                centre = grids[frame].centres()[token - starts[frame]]
                height, width = images[frame].shape[:2]
                return math.hypot((centre[0] - uv[0]) / width * 256, (centre[1] - uv[1]) / height * 256)

            errors, best_possible = [], []
            pairs = iter(range(len(predictions)))
            for point in range(len(tracks)):
                for later in range(1, len(frames)):
                    tokens = [int(grids[f].locate(tracks.uv[point, f])) for f in (0, later)]
                    if not tracks.visible[point, later] or min(tokens) < 0:
                        continue
                    m, frame = next(pairs), later if asked_first else 0
                    true = starts[frame] + tokens[1 if asked_first else 0]
                    assert true == (predictions.target if asked_first else predictions.anchor)[m]
                    uv = tracks.uv[point, frame]
                    errors.append(distance(int(predictions.best[name][2, m]), frame, uv))
                    best_possible.append(distance(true, frame, uv))
            assert next(pairs, None) is None
            shares += [brute_force.mean([float(e < t) for e in errors]) for t in (1, 2, 4, 8, 16)]
            ceilings += [brute_force.mean([float(e < t) for e in best_possible]) for t in (1, 2, 4, 8, 16)]
        delta = evaluation.report["by_features"][name]["delta_avg"]
        assert delta["per_layer"][2] == pytest.approx(brute_force.mean(shares), abs=1e-6)
        assert delta["ceiling"] == pytest.approx(brute_force.mean(ceilings), abs=1e-6)


def test_chance_and_constants_of_a_report_equal_loops_over_its_correspondences(model, dataset, config, tmp_path):
    report = evaluate(model, dataset, config(features=("qk",)), tmp_path).report
    chances, answers, points, moved = [], [], [], []  # of each sequence
    for index in range(len(dataset)):
        matches = collated(model, dataset, index)["matches"]
        xy = matches.token_xy[matches.target].tolist()
        every = [(x, y) for x in range(7) for y in range(7)]
        near = [[float(math.dist(true, at) <= 2) for at in every] for true in xy]
        points.append([brute_force.mean(row) for row in near])
        moved.append([math.dist(a, b) > 2 for a, b in zip(matches.token_xy[matches.anchor].tolist(), xy, strict=True)])
        chances.append(brute_force.mean(points[-1]))
        answers.append([brute_force.mean(list(column)) for column in zip(*near, strict=True)])
    assert report["pck"]["chance"] == pytest.approx(brute_force.mean(chances))
    constant = max(brute_force.mean(list(column)) for column in zip(*answers, strict=True))
    assert report["pck"]["constant"] == pytest.approx(constant)
    assert report["token_grids"] == [{"rows": 7, "columns": 7, "frames": 20}]
    assert all(0 < share <= 1 for share in report["most_frequent"]["per_layer"])
    of_moved = [[share for share, far in zip(*pair, strict=True) if far] for pair in zip(points, moved, strict=True)]
    expected = brute_force.mean([brute_force.mean(shares) for shares in of_moved if shares])
    assert report["pck_moved"]["chance"] == pytest.approx(expected) and any(map(any, moved)) != all(map(all, moved))


def test_options_that_make_no_sense_are_refused(dataset, config):
    with pytest.raises(ValueError, match="radius = -1"):
        config(radius=-1)
    with pytest.raises(ValueError, match="radius = nan"):
        config(radius=math.nan)
    with pytest.raises(ValueError, match="direction = 'back'"):
        config(direction="back")
    with pytest.raises(ValueError, match="add qk to --features"):
        config(confidence="attention", features=("hidden",))


def test_predictions_with_other_token_grids_are_not_reused(models, dataset, config, tmp_path):
    model = models["qwen-gqa"]
    evaluate(model, dataset, config(features=("hidden",)), tmp_path)
    with pytest.raises(ValueError, match=r"frame_pixels: None there, 6272 now.*--fresh"):
        evaluate(replace(model, frame_pixels=6272), dataset, config(features=("hidden",)), tmp_path)

"""The bootstrap of paired differences equals its exact distribution; only shared sequences are paired."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
from evaluation import brute_force

from gasp_fast.evaluation.paired import bootstrap, difference_rows, paired_differences


def report(best: dict[str, float], **changes: Any) -> dict[str, Any]:
    """A report with a PCK for each scene, which has one sequence."""
    values = list(best.values())
    metrics = {"per_sequence": {"best_layer": values, "mean": [v / 2 for v in values], "moved": [None, *values[1:]]}}
    evaluated = [{"sequence": n, "scene": scene, "frames": [0, 3]} for n, scene in enumerate(best)]
    whole = {
        "grid": 8,
        "settings": {"keep": 1.0, "radius": 2.0},
        "evaluated": evaluated,
        "by_features": {"qk": metrics},
    }
    return {**whole, **changes}


def test_the_interval_is_that_of_all_possible_resamples():
    """Three differences have 27 equally likely resamples, so that the exact quantiles can be written down."""
    differences = [0.3, -0.1, 0.2]
    means = [brute_force.mean(list(chosen)) for chosen in itertools.product(differences, repeat=3)]
    mean, low, high = bootstrap(differences, resamples=20_000)
    assert mean == pytest.approx(brute_force.mean(differences))
    assert low == pytest.approx(np.quantile(means, 0.025, method="inverted_cdf"))
    assert high == pytest.approx(np.quantile(means, 0.975, method="inverted_cdf"))


def test_the_interval_of_many_sequences_is_about_1_96_standard_errors():
    differences = np.random.default_rng(0).normal(0.1, 0.5, 400)
    mean, low, high = bootstrap(differences.tolist())
    error = brute_force.deviation(differences.tolist()) / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_the_same_differences_have_the_same_interval():
    assert bootstrap([0.1, 0.5, -0.2, 0.0]) == bootstrap([0.1, 0.5, -0.2, 0.0])
    assert bootstrap([0.1, 0.5, -0.2, 0.0], seed=1) != bootstrap([0.1, 0.5, -0.2, 0.0])


def test_sequences_are_paired_by_scene_and_frames():
    first, second = report({"a": 0.1, "b": 0.2, "c": 0.6}), report({"c": 0.7, "a": 0.5, "d": 0.0})
    found, left_out = paired_differences({"base": first, "new": second}, ["qk"])
    assert not left_out
    by_metric = {one.metric: one for one in found}
    assert by_metric["best_layer"].difference == pytest.approx(brute_force.mean([0.5 - 0.1, 0.7 - 0.6]))
    assert by_metric["mean"].difference == pytest.approx(brute_force.mean([0.4, 0.1]) / 2)
    assert by_metric["best_layer"].sequences == 2 and by_metric["best_layer"].low <= by_metric["best_layer"].high
    assert "moved" not in by_metric  # both are defined for one sequence only
    headings, row, *_ = difference_rows(found, {"base": first, "new": second})
    assert len(headings) == len(row) and row[:4] == ["new − base", "qk", "PCK@2", "2"]


def test_reports_without_shared_sequences_are_left_out_in_one_line():
    base = report({"a": 0.1, "b": 0.2})
    elsewhere = report({"x": 0.1, "y": 0.2})
    other_frames = copy.deepcopy(base)
    for one in other_frames["evaluated"]:
        one["frames"] = [0, 4]
    denser = report({"a": 0.1, "b": 0.2}, grid=12)
    earlier = {name: value for name, value in base.items() if name != "evaluated"}
    reports = {"base": base, "x": elsewhere, "frames": other_frames, "grid": denser, "old": earlier}
    found, left_out = paired_differences(reports, ["qk"])
    assert not found and len(left_out) == 4 and not any("\n" in line for line in left_out)
    for line, text in zip(left_out, ("share fewer", "share fewer", "grid = 8 and 12", "earlier version"), strict=True):
        assert line.startswith("no paired differences between base and") and text in line

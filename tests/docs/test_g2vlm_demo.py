"""The demo of G²VLM learns depth in seconds, and fails where training has no effect."""

import importlib
import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("g2vlm_demo")


@pytest.mark.slow
def test_a_short_demo_learns_the_depth_of_unseen_rooms(demo, monkeypatch, tmp_path):
    """AbsRel of seeds 0 to 2: 0.55, 0.54 and 0.55 of the best constant's."""
    words = ["--scenes", "24", "--steps", "120", "run.progress=false"]
    monkeypatch.setattr(sys, "argv", ["g2vlm_demo.py", "--out", str(tmp_path / "demo"), *words])
    monkeypatch.setattr(demo, "check", lambda results: None)  # its limits are those of the full number of steps
    demo.main()
    scores = json.loads((tmp_path / "demo" / "results.json").read_text())["scores"]
    best, constant, _, before, after = (one["abs_rel"] for one in scores.values())
    assert after < 0.7 * best and before > 0.9 * constant
    assert all((tmp_path / "demo" / name).is_file() for name in ("depth.png", "cameras.png"))


@pytest.mark.parametrize(("abs_rel", "auc", "why"), [(0.5, 0.1, "AbsRel is 0.500"), (0.1, 0.0, "AUC@30 is 0.000")])
def test_a_demo_that_is_no_better_than_guesses_fails(demo, abs_rel, auc, why):
    guesses = {demo.BEST_CONSTANT: {"abs_rel": 0.8}, demo.CONSTANT: {"auc": 0.0}}
    with pytest.raises(SystemExit, match=f"{why}.*training failed"):
        demo.check({**guesses, demo.TRAINED: {"abs_rel": abs_rel, "auc": auc}})

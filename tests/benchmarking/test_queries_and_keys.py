"""The study of queries and keys: its PCK by brute force, and the whole of it in small."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gasp_fast.data.synthetic.scenes import SyntheticConfig
from gasp_fast.loss.matches import Matches

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import queries_and_keys


def random_matches(generator, frames=3, side=6, count=80):
    tokens = side * side
    anchor, target = generator.integers(0, frames * tokens, (2, count))
    other_frame = anchor // tokens != target // tokens
    anchor, target = anchor[other_frame], target[other_frame]
    within_frame = np.arange(frames * tokens) % tokens
    return Matches(
        frame_offsets=torch.arange(frames + 1) * tokens,
        anchor=torch.from_numpy(anchor),
        target=torch.from_numpy(target),
        token_xy=torch.from_numpy(np.stack([within_frame % side, within_frame // side], 1)),
    )


@pytest.mark.parametrize("later", [True, False])
def test_pck_of_a_direction_is_that_of_brute_force(later):
    generator = np.random.default_rng(0)
    matches = random_matches(generator)
    queries, keys = (torch.from_numpy(generator.standard_normal((len(matches.token_xy), 5))).float() for _ in range(2))
    tokens, hits, count = 36, 0, 0
    unit_q, unit_k = (x.double().numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (queries, keys))
    for anchor, target in zip(matches.anchor.tolist(), matches.target.tolist(), strict=True):
        if (target // tokens > anchor // tokens) != later:
            continue
        start = target // tokens * tokens
        found = start + int(np.argmax(unit_k[start : start + tokens] @ unit_q[anchor]))
        apart = np.hypot(*(matches.token_xy[found] - matches.token_xy[target]).tolist())
        hits, count = hits + (apart <= 2), count + 1
    sums = queries_and_keys.PckSums()
    sums.add("q to later k", 0, queries, keys, queries_and_keys.in_direction(matches, later))
    (pck,) = sums.means(1)["q to later k"]
    assert count > 20 and 0 < hits < count
    assert pck == pytest.approx(hits / count, abs=1e-6)


def test_a_folder_of_one_scene_cannot_be_learnt_from_and_measured_on(tmp_path):
    (tmp_path / "scenes" / "only").mkdir(parents=True)
    with pytest.raises(SystemExit, match="1 scenes; one to learn and one to measure are needed"):
        queries_and_keys.photographs(tmp_path / "scenes", tmp_path)


@pytest.mark.slow
def test_the_study_in_small_goes_on_where_it_was_and_ends_with_table_and_picture(tmp_path, monkeypatch, capsys):
    look = SyntheticConfig(frames=8, width=96, height=80, samples=1)
    monkeypatch.setattr(
        queries_and_keys, "ROOMS", {"base": (0, 2, look), "rooms": (10, 2, look), "unseen": (20, 2, look)}
    )
    words = f"--seeds 1 --base-steps 2 --steps 2 --work {tmp_path / 'work'} --out {tmp_path / 'out'}"
    variants = ["heads only", "tied heads", "heads, queries and keys"]
    for count in (1, 3):
        monkeypatch.setattr(sys, "argv", ["queries_and_keys.py", *words.split(), "--variants", *variants[:count]])
        queries_and_keys.main()
    printed = capsys.readouterr().out
    assert printed.count("seed 0, rooms, heads only") == 1  # the second call keeps what the first one measured
    assert "PCK@2 of the best layer" in printed
    found = json.loads((tmp_path / "out/queries-and-keys.json").read_text())["parts"]["rooms"]["0"]
    assert list(found) == ["base", *variants]
    assert list(found["base"]["pck"]) == ["hidden", "q to later k", "q to earlier k"]
    for name in variants:
        assert list(found[name]["pck"]) == ["hidden", "head", "q to later k", "q to earlier k"]
    for name in ("hidden", "q to later k", "q to earlier k"):  # nothing but the heads has learnt
        assert found["heads only"]["pck"][name] == found["base"]["pck"][name]
    assert found["heads only"]["language"] == pytest.approx(found["base"]["language"], rel=1e-6)
    assert found["tied heads"]["language"] != found["base"]["language"]
    assert (tmp_path / "out/queries-and-keys.png").stat().st_size > 5000

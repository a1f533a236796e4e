"""The evaluation set is reproducible and respects its configuration."""

from __future__ import annotations

import shutil

import numpy as np

from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes
from gasp_fast.data.tracks.sequences import is_held_out
from gasp_fast.evaluation.dataset import EvaluationSet, EvaluationSetConfig


def test_frames_are_reproducible_ascending_and_within_the_largest_gap(library):
    config = EvaluationSetConfig(sequences=60, frames=5, max_gap=10)
    first, second = EvaluationSet(library, config), EvaluationSet(library, config)
    gaps: list[int] = []
    for index in range(60):
        frames = first.frames(index)
        assert frames == second.frames(index)
        assert len(set(frames)) == 5 and list(frames) == sorted(frames) and frames[0] >= 0 and frames[-1] < 16
        gaps += [f - frames[0] for f in frames[1:]]
    counts = np.bincount(gaps, minlength=11)
    assert counts[0] == 0 and len(counts) == 11
    assert counts[1:].min() >= 10  # 24 on average
    assert {first.scene_entry(index).name for index in range(3)} == {entry.name for entry in first.scenes}


def test_only_held_out_scenes_are_evaluated(library):
    names = sorted(path.name for path in library.iterdir() if path.is_dir())
    share = next(s / 100 for s in range(1, 100) if 0 < sum(is_held_out(n, s / 100) for n in names) < len(names))
    used = {
        entry.name
        for entry in EvaluationSet(library, EvaluationSetConfig(sequences=5, frames=4, held_out=share)).scenes
    }
    assert used == {name for name in names if is_held_out(name, share)}


def test_a_single_scene_has_the_name_of_its_folder(library, monkeypatch):
    (scene, *_) = sorted(path for path in library.iterdir() if path.is_dir())
    config = EvaluationSetConfig(sequences=2, frames=4)
    monkeypatch.chdir(scene)
    for path in (scene, scene.relative_to(scene)):
        only = EvaluationSet(path, config)
        assert [entry.name for entry in only.scenes] == [scene.name] and len(only.scene(0)) == 16
        assert only.sample(1).frames


def test_scenes_that_are_too_short_are_left_out_with_the_reason(library, tmp_path):
    shutil.copytree(library, tmp_path / "scenes")
    (short,) = render_scenes(tmp_path / "short", 1, config=SyntheticConfig(frames=3, width=64, height=64), workers=1)
    shutil.copytree(short, tmp_path / "scenes" / "short")
    dataset = EvaluationSet(tmp_path / "scenes", EvaluationSetConfig(sequences=5, frames=4))
    assert dataset.unreadable == [("short", "3 frames, fewer than the 4 of a sequence")]
    assert "short" not in {entry.name for entry in dataset.scenes}

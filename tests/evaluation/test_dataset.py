"""The evaluation set is reproducible and respects its configuration."""

from __future__ import annotations

import numpy as np

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

"""Which sequences of an evaluation are pictured, and how: the typical ones, not the best.

Sequences are ranked by PCK at the peak layer of the report's own features and taken at even ranks, quartiles for
three, each from another scene where there are enough. Knows evaluations and pictures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .evaluate import Evaluation, EvaluationConfig, heat_maps
from .figures import KIND_NAMES
from .pictures import Sight, draw_correspondences, draw_heat_map
from .sampling import Questions
from .subject import Subject


def draw_pictures(
    subject: Subject, questions: Questions, config: EvaluationConfig, evaluation: Evaluation, folder: Path, count: int
) -> list[tuple[str, Path]]:
    """Writes `count` pairs of pictures to `folder`; returns them with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = evaluation.kinds[0]
    number = evaluation.report["pck"]["peak_layer"]
    row = evaluation.layers[kind].index(number - 1)
    drawn: list[tuple[str, Path]] = []
    for index in typical(evaluation, row, count, [questions.scene_entry(i).name for i in range(len(questions))]):
        answers, sample = evaluation.answers[index], questions.sample(index)
        name = questions.scene_entry(index).name
        sight = Sight(
            title=f"{subject.name}, layer {number}, {KIND_NAMES[kind]}: {questions.scene(index).root.resolve().name}",
            frames=sample.frames,
            numbers=questions.frames(index),
            grids=[subject.backbone.frame_grid(frame.shape[1], frame.shape[0]) for frame in sample.frames],
            anchor=answers.anchor,
            target=answers.target,
            best=answers.best[kind][row],
            correct=answers.correct[kind][row],
        )
        caption = f"Scene {name}, frames {', '.join(map(str, sight.numbers))}"
        drawn.append((caption, draw_correspondences(sight, folder / f"correspondences-{index:05d}.png")))
        anchor = telling_point(sight)
        maps = heat_maps(subject, sample, kind, number - 1, anchor, config.rope, config.temperature)
        drawn.append((f"{caption}: one point", draw_heat_map(sight, maps, anchor, folder / f"heat-{index:05d}.png")))
    return drawn


def typical(evaluation: Evaluation, row: int, count: int, scenes: list[str]) -> list[int]:
    """Indices of sequences at even ranks of PCK, with as many points as most have."""
    kind = evaluation.kinds[0]
    asked = [index for index, one in enumerate(evaluation.answers) if len(one.gap)]
    points = np.median([len(evaluation.answers[index].gap) for index in asked])
    rich = [index for index in asked if len(evaluation.answers[index].gap) >= points]
    ranked = sorted(rich, key=lambda index: (evaluation.answers[index].correct[kind][row].mean(), index))
    wanted = [int((k + 0.5) / count * len(ranked)) for k in range(count)]
    chosen: list[int] = []
    for place in wanted:
        # The nearest rank whose scene is not shown yet; failing that, the nearest that is not shown.
        near = sorted((index for index in ranked if index not in chosen), key=lambda i: abs(ranked.index(i) - place))
        fresh = [index for index in near if scenes[index] not in {scenes[c] for c in chosen}]
        chosen += (fresh or near)[:1]
    return chosen


def telling_point(sight: Sight) -> int:
    """The anchor seen in most of the shown frames; of those, the one that moves most."""
    moved = sight.displacement()
    shown = np.isin(sight.frame_of(sight.target), sight.shown())
    seen = {anchor: len(set(sight.target[shown & (sight.anchor == anchor)].tolist())) for anchor in moved}
    return max(moved, key=lambda anchor: (seen[anchor], moved[anchor], -anchor))

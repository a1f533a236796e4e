"""Which sequences of an evaluation are pictured, and how: the typical ones, not the best.

Sequences are ranked by PCK at the peak layer of the report's own features and taken at even ranks, quartiles for
three, each from another scene where there are enough. Knows evaluations and pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gasp_fast.backbones import Backbone

from .evaluate import Evaluation, EvaluationConfig, heat_maps
from .figures import KIND_NAMES
from .pictures import Sight, draw_answers, draw_correspondences, draw_heat_map
from .report import read_report
from .sampling import QuestionConfig, Questions
from .store import Answers, read_answers
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
    for index in typical(evaluation.answers, kind, row, count, _scene_names(questions)):
        answers, sample = evaluation.answers[index], questions.sample(index)
        name = questions.scene_entry(index).name
        title = f"{subject.name}, layer {number}, {KIND_NAMES[kind]}: {questions.scene(index).root.resolve().name}"
        sight = _sight(title, subject.backbone, questions, index, answers, kind, row)
        caption = f"Scene {name}, frames {', '.join(map(str, sight.numbers))}"
        drawn.append((caption, draw_correspondences(sight, folder / f"correspondences-{index:05d}.png")))
        anchor = telling_point(sight)
        maps = heat_maps(subject, sample, kind, number - 1, anchor, config.rope, config.temperature)
        drawn.append((f"{caption}: one point", draw_heat_map(sight, maps, anchor, folder / f"heat-{index:05d}.png")))
    return drawn


def draw_comparison(
    folders: Mapping[str, Path], scenes: Path, backbone: Backbone, folder: Path, count: int
) -> list[tuple[str, Path]]:
    """What several evaluations answered to the same questions, each at its best layer; the last one picks them.

    `folders` are those of `gasp-fast evaluate`, by the name of the row; `backbone` is that of any of the models.
    """
    reports = {name: read_report(path) for name, path in folders.items()}
    last = list(reports.values())[-1]
    kind = last["features"]
    questions = Questions(scenes, _asked(last))
    answers = {name: read_answers(path, kind, len(questions)) for name, path in folders.items()}
    rows = {
        name: report["by_features"][kind]["layers"].index(report["by_features"][kind]["pck"]["peak_layer"])
        for name, report in reports.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    *_, (chooser, theirs) = answers.items()
    for index in typical(theirs, kind, rows[chooser], count, _scene_names(questions)):
        sights = {
            name: _sight("", backbone, questions, index, found[index], kind, rows[name])
            for name, found in answers.items()
        }
        frames = ", ".join(map(str, questions.frames(index)))
        name = questions.scene_entry(index).name
        path = draw_answers(sights, f"{KIND_NAMES[kind].capitalize()}, {name}", folder / f"answers-{index:05d}.png")
        drawn.append((f"The same points, asked of each model. Scene {name}, frames {frames}", path))
    return drawn


def _asked(report: Mapping[str, Any]) -> QuestionConfig:
    return QuestionConfig(
        sequences=report["sequences"] + report["sequences_without_tracks"],
        frames=report["frames"],
        grid=report["grid"],
        **{name: report["settings"][name] for name in ("max_gap", "keep", "held_out", "seed")},
    )


def _scene_names(questions: Questions) -> list[str]:
    return [questions.scene_entry(index).name for index in range(len(questions))]


def _sight(
    title: str, backbone: Backbone, questions: Questions, index: int, answers: Answers, kind: str, row: int
) -> Sight:
    frames = [questions.scene(index).image(frame) for frame in questions.frames(index)]
    return Sight(
        title=title,
        frames=frames,
        numbers=questions.frames(index),
        grids=[backbone.frame_grid(frame.shape[1], frame.shape[0]) for frame in frames],
        anchor=answers.anchor,
        target=answers.target,
        best=answers.best[kind][row],
        correct=answers.correct[kind][row],
    )


def typical(answers: Sequence[Answers], kind: str, row: int, count: int, scenes: list[str]) -> list[int]:
    """Indices of sequences at even ranks of PCK, with as many points as most have."""
    asked = [index for index, one in enumerate(answers) if len(one.gap)]
    points = np.median([len(answers[index].gap) for index in asked])
    rich = [index for index in asked if len(answers[index].gap) >= points]
    ranked = sorted(rich, key=lambda index: (answers[index].correct[kind][row].mean(), index))
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

"""Chooses representative sequences of an evaluation and draws their predictions.

Sequences are ranked by PCK at the best layer and taken at even ranks (for three: one of each third), each from
another scene where there are enough scenes. Only the forward direction is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from gasp_fast.backbones import TokenGrid
from gasp_fast.backbones.base import RGBImage

from .dataset import EvaluationSet, EvaluationSetConfig
from .evaluate import Evaluation, EvaluationConfig
from .evaluated_model import EvaluatedModel
from .features import Kind
from .figures import KIND_NAMES
from .matching import is_causal
from .pictures import DrawnSequence, draw_heat_map, draw_predictions
from .predict import heat_maps
from .predictions import Predictions, PredictionStore
from .report import Picture, left_out, read_report
from .tables import radius_of


def draw_gallery(
    evaluated: EvaluatedModel,
    dataset: EvaluationSet,
    config: EvaluationConfig,
    evaluation: Evaluation,
    folder: Path,
    count: int,
) -> list[Picture]:
    """Draws correspondences and a heat map of `count` sequences into `folder`; returns captions and files."""
    folder.mkdir(parents=True, exist_ok=True)
    name, layers = next(iter(evaluation.layers.items()))
    if is_causal(name):
        return []
    kind = cast(Kind, name)
    number = evaluation.report["pck"]["peak_layer"]
    row = layers.index(number - 1)
    pictures: list[Picture] = []
    ranks = {index: _pck(one, kind, row, config.radius) for index, one in enumerate(evaluation.predictions) if len(one)}
    for index in representative_sequences(dataset, evaluation.predictions, ranks, count):
        title = f"{evaluated.name}, layer {number}, {KIND_NAMES[kind]}: {dataset.scene(index).root.resolve().name}"
        sequence = _drawn_sequence(dataset, index, evaluation.predictions[index], kind, row, config.radius)
        caption = _caption(dataset, index)
        path = draw_predictions({"predicted": sequence}, title, folder / f"correspondences-{index:05d}.png")
        pictures.append((caption, path))
        query = most_visible_point(sequence)
        maps = heat_maps(evaluated, dataset.sample(index), kind, number - 1, query, config.rope, config.temperature)
        path = draw_heat_map(sequence, maps, query, title, folder / f"heat-{index:05d}.png")
        pictures.append((f"{caption}: one query point", path))
    return pictures


def draw_comparison(outs: Mapping[str, Path], scenes: Path, folder: Path, count: int) -> list[Picture]:
    """Draws the predictions of several evaluations of the same sequences, each at its best layer.

    `outs` are output folders of `gasp-fast evaluate` by the model's name; the last one determines the sequences and
    features. Features that the others lack are passed over.
    """
    reports = {name: read_report(out, whole=True) for name, out in outs.items()}
    last = next(reversed(reports))
    shared = [
        kind
        for kind in (reports[last]["features"], *reports[last]["by_features"])
        if not is_causal(kind) and all(kind in report["by_features"] for report in reports.values())
    ]
    if not shared:
        raise ValueError("pictures show the forward direction, of which the reports share no features; omit --scenes")
    kind, radius = shared[0], radius_of(reports[last])
    dataset = EvaluationSet(scenes, _dataset_config(reports[last]))
    skipped = {index for report in reports.values() for index in left_out(report)}
    if any(report["scenes"] != [entry.name for entry in dataset.scenes] for report in reports.values()):
        raise ValueError(f"--scenes {scenes}: not the scenes of all reports; give those that were evaluated")
    predictions = {name: PredictionStore(out, [kind]).load_all(len(dataset), skipped) for name, out in outs.items()}
    rows = {
        name: report["by_features"][kind]["layers"].index(report["by_features"][kind]["pck"]["peak_layer"])
        for name, report in reports.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    drawn = [  # of sequences that all of them have
        one if all(len(predictions[name][index]) for name in reports) else Predictions.empty({kind: rows[last] + 1})
        for index, one in enumerate(predictions[last])
    ]
    ranks = {index: _pck(one, kind, rows[last], radius) for index, one in enumerate(drawn) if len(one)}
    for index in representative_sequences(dataset, drawn, ranks, count) if ranks else []:
        sequences = {
            name: _drawn_sequence(dataset, index, predictions[name][index], kind, rows[name], radius)
            for name in reports
        }
        title = f"{KIND_NAMES[kind].capitalize()}, {dataset.scene_entry(index).name}"
        path = draw_predictions(sequences, title, folder / f"answers-{index:05d}.png")
        pictures.append((f"Predictions of each model. {_caption(dataset, index)}", path))
    return pictures


def _dataset_config(report: Mapping[str, Any]) -> EvaluationSetConfig:
    """The evaluation set that a report was made on."""
    return EvaluationSetConfig(
        sequences=report["sequences"] + report["sequences_without_tracks"] + len(left_out(report)),
        frames=report["frames"],
        grid=report["grid"],
        **{name: report["settings"][name] for name in ("max_gap", "keep", "held_out", "seed")},
    )


def _caption(dataset: EvaluationSet, index: int) -> str:
    return f"Scene {dataset.scene_entry(index).name}, frames {', '.join(map(str, dataset.frames(index)))}"


def _pck(predictions: Predictions, kind: str, row: int, radius: float) -> float:
    return float(predictions.correct(kind, radius)[row].mean())


def _drawn_sequence(
    dataset: EvaluationSet, index: int, predictions: Predictions, kind: str, row: int, radius: float
) -> DrawnSequence:
    frames = [dataset.scene(index).image(frame) for frame in dataset.frames(index)]
    return DrawnSequence(
        frames=frames,
        numbers=dataset.frames(index),
        grids=[_in_pixels(grid, frame) for grid, frame in zip(predictions.token_grids(), frames, strict=True)],
        anchor=predictions.anchor,
        target=predictions.target,
        best=predictions.best[kind][row],
        correct=predictions.correct(kind, radius)[row],
        radius=radius,
    )


def _in_pixels(grid: TokenGrid, frame: RGBImage) -> TokenGrid:
    """A grid whose rectangle is in shares of the frame's size, in its pixels."""
    height, width = frame.shape[:2]
    return replace(
        grid, left=grid.left * width, right=grid.right * width, top=grid.top * height, bottom=grid.bottom * height
    )


def representative_sequences(
    dataset: EvaluationSet, predictions: Sequence[Predictions], pck: Mapping[int, float], count: int
) -> list[int]:
    """Indices of sequences at even ranks of PCK, among those with at least the median number of correspondences.

    `pck` has the sequences that can be chosen.
    """
    median = np.median([len(predictions[index]) for index in pck])
    candidates = [index for index in pck if len(predictions[index]) >= median]
    ranked = sorted(candidates, key=lambda index: (pck[index], index))
    chosen: list[int] = []
    for rank in (int((k + 0.5) / count * len(ranked)) for k in range(count)):
        # The nearest rank from a scene that is not chosen yet; if there is none, the nearest that is not chosen.
        nearest = sorted((i for i in ranked if i not in chosen), key=lambda i: abs(ranked.index(i) - rank))
        scenes = {dataset.scene_entry(i).name for i in chosen}
        other_scenes = [i for i in nearest if dataset.scene_entry(i).name not in scenes]
        chosen += (other_scenes or nearest)[:1]
    return chosen


def most_visible_point(sequence: DrawnSequence) -> int:
    """Token of the query point that is visible in most of the drawn frames; of several, the one that moves most."""
    displacement = sequence.displacement()
    shown = np.isin(sequence.frame_of(sequence.target), sequence.shown_frames())
    visible = {query: len(set(sequence.target[shown & (sequence.anchor == query)].tolist())) for query in displacement}
    return max(displacement, key=lambda query: (visible[query], displacement[query], -query))

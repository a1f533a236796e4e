"""Content of `report.json`: every metric of every measured name, and what was evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .baselines import Answers, best_constant, chance, most_frequent
from .dataset import EvaluationSet
from .evaluated_model import EvaluatedModel
from .metrics import group_pck, summary
from .position_error import delta_avg
from .predictions import Predictions


def report_content(
    evaluated: EvaluatedModel,
    dataset: EvaluationSet,
    layers: Mapping[str, Sequence[int]],  # of each measured name, from 0
    predictions: Sequence[Predictions],  # of every sequence, empty without correspondences
    unreadable: Mapping[int, str],  # sequence -> reason
    settings: Mapping[str, Any],
    radius: float,
) -> dict[str, Any]:
    """The metrics of the first measured name on top, of all under `by_features`."""
    config = dataset.config
    indices = [index for index, one in enumerate(predictions) if len(one)]
    tracked = [predictions[index] for index in indices]
    by_name = {
        name: metrics_of(tracked, name, [n + 1 for n in numbers], radius, config.max_gap)
        for name, numbers in layers.items()
    }
    first = next(iter(layers))
    return {
        "model": evaluated.name,
        "sequences": len(tracked),
        "frames": config.frames,
        "grid": config.grid,
        "token_grids": token_grids(tracked),
        "features": first,
        **by_name[first],
        "questions": sum(map(len, tracked)),  # correspondences: pairs of a query point and a later frame
        "evaluated": [
            {"sequence": index, "scene": dataset.scene_entry(index).name, "frames": list(dataset.frames(index))}
            for index in indices
        ],
        "sequences_without_tracks": len(predictions) - len(unreadable) - len(tracked),
        "unreadable": {
            "scenes": dict(dataset.unreadable),  # name -> reason
            "sequences": [
                {"sequence": index, "scene": dataset.scene_entry(index).name, "reason": unreadable[index]}
                for index in sorted(unreadable)
            ],
        },
        "scenes": [entry.name for entry in dataset.scenes],
        "scene_digests": {entry.name: entry.digest for entry in dataset.scenes},  # of frames, poses and cameras
        "heads": evaluated.heads_origin,
        "settings": {
            **{name: getattr(config, name) for name in ("max_gap", "keep", "held_out", "seed")},
            **settings,
            "radius": radius,
        },
        "by_features": by_name,
    }


def metrics_of(
    sequences: Sequence[Predictions], name: str, layers: Sequence[int], radius: float, max_gap: int
) -> dict[str, Any]:
    """All metrics of one measured name; `layers` count from 1. Every sequence has a correspondence."""
    outcomes = [one.outcomes(name, radius) for one in sequences]
    answers = [one.answers(name) for one in sequences]
    of_moved = [one.of_points(outcome.moved) for one, outcome in zip(answers, outcomes, strict=True)]
    metrics = summary(outcomes, layers, max_gap)
    metrics["pck"] |= _without_looking(answers, radius)
    metrics["pck_moved"] |= _without_looking(of_moved, radius)
    metrics["most_frequent"] = {"per_layer": most_frequent(answers)}
    distances = [one.distances(name) for one in sequences]
    metrics["delta_avg"] = {
        "per_layer": delta_avg([predicted for predicted, _ in distances]),
        "ceiling": delta_avg([true[None] for _, true in distances])[0],
    }
    if all(name in one.groups for one in sequences):
        undefined = np.any([(one.groups[name] < 0).any(-1) for one in sequences], axis=0)  # [layers, G]
        if not undefined.all():
            groups = group_pck([one.group_correct(name, radius) for one in sequences], undefined)
            groups |= {"peak_layer": layers[groups["peak_layer"]], "peak_group": groups["peak_group"] + 1}
            metrics["pck_groups"] = groups
    return metrics


def _without_looking(answers: Sequence[Answers], radius: float) -> dict[str, Any]:
    return {"chance": chance(answers, radius), "constant": best_constant(answers, radius)}


def token_grids(sequences: Sequence[Predictions]) -> list[dict[str, int]]:
    """Sizes of the frames' token grids, the most frequent first."""
    sizes = Counter((grid.rows, grid.columns) for one in sequences for grid in one.token_grids())
    return [{"rows": rows, "columns": columns, "frames": count} for (rows, columns), count in sizes.most_common()]

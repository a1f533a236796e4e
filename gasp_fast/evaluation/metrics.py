"""Metrics of predicted matches: PCK, moved points, confidence against correctness, PCK by temporal gap. NumPy only.

A correspondence is a query point of the anchor frame and its true position in a later frame. Every layer predicts that
position with a confidence.

- **PCK** of a layer: share of correct predictions within a sequence, then mean and standard deviation over sequences.
  Correct means within a radius, by default two patches, of the true position on the token grid.
- **Moved points** are those whose true position is further than that radius from where they started. Predicting the
  same position is wrong for all of them; its PCK, the share of the other points, is the **identity** baseline.
- **rho** of a layer: Pearson correlation over all predictions between confidence (the greatest matching probability)
  and correctness (paper, Eq. 13). The **calibration gap** is the mean confidence of correct predictions minus that of
  wrong ones.
- **Temporal**: PCK of the correspondences at each gap, and the same divided by the PCK at gap 1.
- **Head groups**: PCK of the queries and keys of one key head, with the query heads that share it.

A metric that is undefined (all correct, constant confidence, no correspondence at that gap) is `None`, in JSON `null`.
So are all metrics of a layer with a prediction whose confidence is NaN: its features are not finite. Means over layers
leave it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Equal similarities give probabilities that differ by rounding. A relative spread up to this counts as constant.
ROUNDING = 1e-5

Metric = float | None


@dataclass(frozen=True)
class Outcomes:
    """Scored predictions of one sequence: `L` layers, `M` correspondences."""

    correct: NDArray[np.bool_]  # [L, M]
    confidence: NDArray[np.float32]  # [L, M]; NaN: no prediction
    gap: NDArray[np.integer]  # [M], frames between the two
    moved: NDArray[np.bool_]  # [M]

    def of_layers(self, chosen: NDArray[np.bool_]) -> Outcomes:
        return replace(self, correct=self.correct[chosen], confidence=self.confidence[chosen])


def within(xy: NDArray[Any], truth: NDArray[Any], radius: float) -> NDArray[np.bool_]:
    """Whether positions `[..., 2]` on the token grid are at most `radius` patches apart."""
    offset = xy.astype(np.int64) - truth.astype(np.int64)
    return (offset**2).sum(-1) <= radius**2


def summary(sequences: Sequence[Outcomes], layers: Sequence[int], max_gap: int) -> dict[str, Any]:
    """All metrics of one kind of features; `layers` are the layer numbers of the report, from 1.

    Every sequence has at least one correspondence, and at least one layer has no NaN.
    """
    everything = np.concatenate([one.confidence for one in sequences], axis=1)  # [layers, all correspondences]
    defined = np.array([not np.isnan(row).any() for row in everything])  # [layers]
    sequences = [one.of_layers(defined) for one in sequences]
    defined_layers = np.array(layers)[defined]  # [L]

    def per_layer_of(values: Sequence[Metric]) -> list[Metric]:
        remaining = iter(values)
        return [next(remaining) if one else None for one in defined]

    pck = np.stack([one.correct.mean(1) for one in sequences])  # [B, L]
    per_layer = pck.mean(0)
    best = int(per_layer.argmax())
    moved = [one.correct[:, one.moved].mean(1) for one in sequences if one.moved.any()]
    confidence = np.concatenate([one.confidence for one in sequences], axis=1)  # [L, all correspondences]
    correct = np.concatenate([one.correct for one in sequences], axis=1)
    rho_per_sequence = [list(map(correlation, one.confidence, one.correct)) for one in sequences]  # [B][L]
    return {
        "layers": list(layers),
        "pck": {
            "per_layer": per_layer_of(per_layer.tolist()),
            "per_layer_std": per_layer_of(pck.std(0).tolist()),
            "mean": float(per_layer.mean()),
            "peak": float(per_layer[best]),
            "peak_layer": int(defined_layers[best]),
        },
        "pck_moved": {
            "per_layer": per_layer_of(np.mean(moved, 0).tolist()) if moved else [None] * len(layers),
            "per_layer_std": per_layer_of(np.std(moved, 0).tolist()) if moved else [None] * len(layers),
            "share": float(np.concatenate([one.moved for one in sequences]).mean()),
        },
        "identity": float(np.mean([1 - one.moved.mean() for one in sequences])),
        "rho": {
            "per_layer": per_layer_of(list(map(correlation, confidence, correct))),
            "per_layer_std": per_layer_of([_deviation(values) for values in zip(*rho_per_sequence, strict=True)]),
        },
        "calibration_gap": {"per_layer": per_layer_of(list(map(calibration_gap, confidence, correct)))},
        "temporal": {"layer": int(defined_layers[best]), **temporal(sequences, best, max_gap)},
        "per_sequence": {  # what a paired comparison of reports needs
            "best_layer": pck[:, best].tolist(),
            "mean": pck.mean(1).tolist(),
            "moved": [float(one.correct[best, one.moved].mean()) if one.moved.any() else None for one in sequences],
        },
    }


def group_pck(sequences: Sequence[NDArray[np.bool_]], undefined: NDArray[np.bool_]) -> dict[str, Any]:
    """PCK of each head group, from correctness `[layers, G, M]` of each sequence; None where `undefined` `[layers, G]`.

    At least one group of one layer is defined. Layers and groups of the peak are indices.
    """
    pck = np.mean([one.mean(-1) for one in sequences], axis=0)  # [layers, G]
    layer, group = np.unravel_index(np.where(undefined, -1.0, pck).argmax(), pck.shape)
    return {
        "per_layer": [
            [None if nan else float(value) for value, nan in zip(*rows, strict=True)]
            for rows in zip(pck, undefined, strict=True)
        ],
        "mean_per_layer": [None if nan.any() else float(row.mean()) for row, nan in zip(pck, undefined, strict=True)],
        "peak": float(pck[layer, group]),
        "peak_layer": int(layer),
        "peak_group": int(group),
    }


def correlation(confidence: NDArray[Any], correct: NDArray[np.bool_]) -> Metric:
    """Pearson correlation; None where either side is constant."""
    if correct.all() or not correct.any():
        return None
    x = confidence.astype(np.float64)
    if np.ptp(x) <= ROUNDING * np.abs(x).max():
        return None
    x, y = x - x.mean(), correct - correct.mean()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def calibration_gap(confidence: NDArray[Any], correct: NDArray[np.bool_]) -> Metric:
    """Mean confidence of correct minus that of wrong predictions; None where one of the two is missing."""
    if correct.all() or not correct.any():
        return None
    return float(confidence[correct].mean(dtype=np.float64) - confidence[~correct].mean(dtype=np.float64))


def temporal(sequences: Sequence[Outcomes], best: int, max_gap: int) -> dict[str, Any]:
    """PCK at gaps 1 to `max_gap`, of layer `best` (an index) and of the mean over layers."""
    gaps = list(range(1, max_gap + 1))
    at_gap: list[NDArray[np.float64]] = []  # for each gap [sequences with it, L + 1]; the last column is identity
    for gap in gaps:
        rows = [
            np.append(one.correct[:, one.gap == gap].mean(1), 1 - one.moved[one.gap == gap].mean())
            for one in sequences
            if (one.gap == gap).any()
        ]
        at_gap.append(np.array(rows))
    best_pck = [float(rows[:, best].mean()) if len(rows) else None for rows in at_gap]
    mean_pck = [float(rows[:, :-1].mean()) if len(rows) else None for rows in at_gap]
    identity = [float(rows[:, -1].mean()) if len(rows) else None for rows in at_gap]
    return {
        "gaps": gaps,
        "sequences": [len(rows) for rows in at_gap],
        "pck": best_pck,
        "pck_std": [float(rows[:, best].std()) if len(rows) else None for rows in at_gap],
        "normalized": _normalized(best_pck),
        "mean_over_layers": {"pck": mean_pck, "normalized": _normalized(mean_pck)},
        "identity": identity,
    }


def _normalized(by_gap: Sequence[Metric]) -> list[Metric]:
    """Divided by the value at gap 1."""
    first = by_gap[0]
    return [None if value is None or not first else value / first for value in by_gap]


def _deviation(values: Sequence[Metric]) -> Metric:
    defined = [value for value in values if value is not None]
    return float(np.std(defined)) if defined else None

"""Judging matches: PCK, moved points, confidence against correctness, and how long a match holds. NumPy only.

Knows, for each question (a point of the first frame and another frame), whether each layer answered it rightly and
how surely; must not know models, images or files.

- **PCK** of a layer: the share of right answers within a sequence, then mean and deviation over sequences. Right means
  at most two patches from the truth on the token grid.
- **Moved points** are those whose truth lies further from where they started than that radius: whoever answers "the
  same position" is wrong on all of them. The share of the others is the **identity** baseline.
- **rho** of a layer: Pearson's correlation, over all answers, between confidence (the greatest matching probability)
  and correctness (paper, Eq. 13). The **calibration gap** is the mean confidence of right answers minus that of wrong.
- **Temporal**: PCK of the questions at each gap, and the same divided by that of gap 1.

Where a number does not exist (all right, all equally sure, no question at that gap) it is `None`, in JSON `null`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Equal similarities give probabilities that differ by rounding; a spread below this (relative) says nothing.
ROUNDING = 1e-5

Number = float | None


@dataclass(frozen=True)
class Outcomes:
    """The answers of one sequence: `L` layers, `M` questions."""

    correct: NDArray[np.bool_]  # [L, M]
    confidence: NDArray[np.float32]  # [L, M]
    gap: NDArray[np.integer]  # [M], frames between the two
    moved: NDArray[np.bool_]  # [M]

    def __len__(self) -> int:
        return len(self.gap)


def within(xy: NDArray[Any], truth: NDArray[Any], radius: float) -> NDArray[np.bool_]:
    """Whether places `[..., 2]` on the token grid are at most `radius` patches apart."""
    offset = xy.astype(np.int64) - truth.astype(np.int64)
    return (offset**2).sum(-1) <= radius**2


def summary(sequences: Sequence[Outcomes], layers: Sequence[int], max_gap: int) -> dict[str, Any]:
    """All figures of one kind of feature. `layers` are the numbers (from 1) by which the report calls them."""
    asked = [one for one in sequences if len(one)]
    if not asked:
        raise ValueError("no sequence has a point that is seen twice; there is nothing to measure")
    pck = np.stack([one.correct.mean(1) for one in asked])  # [B, L]
    per_layer = pck.mean(0)
    best = int(per_layer.argmax())
    moved = [one.correct[:, one.moved].mean(1) for one in asked if one.moved.any()]
    rho = [correlation(*pair) for pair in _answers_by_layer(asked)]
    rho_each = [[correlation(c, r) for c, r in zip(one.confidence, one.correct, strict=True)] for one in asked]
    return {
        "layers": list(layers),
        "pck": {
            "per_layer": per_layer.tolist(),
            "per_layer_std": pck.std(0).tolist(),
            "mean": float(per_layer.mean()),
            "peak": float(per_layer[best]),
            "peak_layer": int(layers[best]),
        },
        "pck_moved": {
            "per_layer": np.mean(moved, 0).tolist() if moved else [None] * len(layers),
            "per_layer_std": np.std(moved, 0).tolist() if moved else [None] * len(layers),
            "share": float(np.concatenate([one.moved for one in asked]).mean()),
        },
        "identity": float(np.mean([1 - one.moved.mean() for one in asked])),
        "rho": {"per_layer": rho, "per_layer_std": [_deviation(each) for each in zip(*rho_each, strict=True)]},
        "calibration_gap": {"per_layer": [calibration_gap(*pair) for pair in _answers_by_layer(asked)]},
        "temporal": {"layer": int(layers[best]), **temporal(asked, best, max_gap)},
    }


def correlation(confidence: NDArray[Any], correct: NDArray[np.bool_]) -> Number:
    """Pearson's; None where either side does not vary."""
    if not len(correct) or correct.all() or not correct.any():
        return None
    x = confidence.astype(np.float64)
    if np.ptp(x) <= ROUNDING * np.abs(x).max():
        return None
    x, y = x - x.mean(), correct - correct.mean()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def calibration_gap(confidence: NDArray[Any], correct: NDArray[np.bool_]) -> Number:
    """How much surer the right answers are than the wrong ones; None where there is only one sort."""
    if not len(correct) or correct.all() or not correct.any():
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
    of_best = [float(rows[:, best].mean()) if len(rows) else None for rows in at_gap]
    of_mean = [float(rows[:, :-1].mean()) if len(rows) else None for rows in at_gap]
    identity = [float(rows[:, -1].mean()) if len(rows) else None for rows in at_gap]
    return {
        "gaps": gaps,
        "sequences": [len(rows) for rows in at_gap],
        "pck": of_best,
        "pck_std": [float(rows[:, best].std()) if len(rows) else None for rows in at_gap],
        "normalized": _normalized(of_best),
        "mean_over_layers": {"pck": of_mean, "normalized": _normalized(of_mean)},
        "identity": identity,
    }


def _normalized(by_gap: Sequence[Number]) -> list[Number]:
    """Divided by the value at gap 1."""
    first = by_gap[0]
    return [None if value is None or not first else value / first for value in by_gap]


def _answers_by_layer(sequences: Sequence[Outcomes]) -> list[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """For each layer, confidence and correctness of the answers of all sequences."""
    confidence = np.concatenate([one.confidence for one in sequences], axis=1)
    correct = np.concatenate([one.correct for one in sequences], axis=1)
    return list(zip(confidence, correct, strict=True))


def _deviation(values: Sequence[Number]) -> Number:
    known = [value for value in values if value is not None]
    return float(np.std(known)) if known else None

"""Predictions and statistics in loops over dense float64 similarities; shares no code with the package."""

from __future__ import annotations

import math

from torch import Tensor

from gasp_fast import Matches


def predictions(
    queries: Tensor, keys: Tensor, matches: Matches, temperature: float, radius: float = 2.0
) -> tuple[list[int], list[float], list[bool]]:
    """Predicted token, its probability and whether it is correct, for each match. Features are `[N, D]`."""
    q, k = queries.double(), keys.double()
    q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
    offsets = matches.frame_offsets.tolist()
    best, confidence, correct = [], [], []
    for anchor, target in zip(matches.anchor.tolist(), matches.target.tolist(), strict=True):
        frame = next(f for f in range(len(offsets) - 1) if offsets[f] <= target < offsets[f + 1])
        logits = ((k[offsets[frame] : offsets[frame + 1]] @ q[anchor]) / temperature).tolist()
        top = max(logits)
        place = logits.index(top) + offsets[frame]
        best.append(place)
        confidence.append(1 / sum(math.exp(x - top) for x in logits))
        dx, dy = (int(matches.token_xy[place, c]) - int(matches.token_xy[target, c]) for c in (0, 1))
        correct.append(math.sqrt(dx * dx + dy * dy) <= radius)
    return best, confidence, correct


def pearson(x: list[float], y: list[bool]) -> float | None:
    n = len(x)
    mx, my = sum(x) / n, sum(y) / n
    sxx, syy = sum((a - mx) ** 2 for a in x), sum((b - my) ** 2 for b in y)
    if sxx == 0 or syy == 0:
        return None
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / math.sqrt(sxx * syy)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def deviation(values: list[float]) -> float:
    centre = mean(values)
    return math.sqrt(mean([(v - centre) ** 2 for v in values]))

"""What PCK is without any correspondence, and how often a layer repeats itself. NumPy only.

- **Chance**: a prediction drawn uniformly from the frame's tokens is correct with the probability that a token lies
  within the radius of the true one. Tokens at the border have fewer neighbours, so it depends on where the points are.
- **Best constant**: PCK of predicting one token always, the best one of each size of token grid. It uses the answers,
  so no constant prediction is better.
- **Most frequent answer**: the share of a layer's predictions that name its most frequent token. Near 1 where the layer
  has one answer for all questions.

Chance and best constant are averaged as PCK is: within a sequence, then over sequences.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metrics import Metric, within

Grid = tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class Answers:
    """True and predicted tokens of one sequence's `M` correspondences, on the token grids of their frames."""

    grid: NDArray[np.integer]  # [M, 2], rows and columns
    true: NDArray[np.integer]  # [M, 2], column and row
    best: NDArray[np.integer]  # [L, M, 2], column and row; (-1, -1): no prediction

    def of_points(self, chosen: NDArray[np.bool_]) -> Answers:
        return Answers(self.grid[chosen], self.true[chosen], self.best[:, chosen])


def chance(sequences: Sequence[Answers], radius: float) -> Metric:
    """PCK of uniformly random predictions; None without correspondences."""
    shares = [
        sum(float(near.mean(1).sum()) for _, near in _near(one, radius)) / len(one.true)
        for one in sequences
        if len(one.true)
    ]
    return float(np.mean(shares)) if shares else None


def best_constant(sequences: Sequence[Answers], radius: float) -> Metric:
    """PCK of always predicting the best token of each grid; None without correspondences."""
    tracked = [one for one in sequences if len(one.true)]
    pck: dict[Grid, Any] = defaultdict(float)  # of each token of the grid: its part of the sum over sequences
    for one in tracked:
        for grid, near in _near(one, radius):
            pck[grid] += near.sum(0) / len(one.true)
    return sum(float(tokens.max()) for tokens in pck.values()) / len(tracked) if tracked else None


def most_frequent(sequences: Sequence[Answers]) -> list[Metric]:
    """The share of all predictions of each layer that are its most frequent token (of a grid).

    None for a layer that has no prediction for a correspondence.
    """
    shares: list[Metric] = []
    grids = np.concatenate([one.grid for one in sequences])  # [all correspondences, 2]
    for best in np.concatenate([one.best for one in sequences], axis=1):
        _, counts = np.unique(np.concatenate([grids, best], axis=1), axis=0, return_counts=True)
        shares.append(None if (best < 0).any() else float(counts.max()) / len(best))
    return shares


def _near(answers: Answers, radius: float) -> Iterator[tuple[Grid, NDArray[np.bool_]]]:
    """For each grid of a sequence, whether a token is within the radius of a true one: `[true tokens, tokens]`."""
    for rows, columns in {(int(rows), int(columns)) for rows, columns in answers.grid}:
        true = answers.true[(answers.grid == (rows, columns)).all(1)]
        row, column = np.divmod(np.arange(rows * columns), columns)
        yield (rows, columns), within(true[:, None], np.stack([column, row], -1), radius)

"""Interleaves data sources by weight: position → (source, epoch, index).

Positions form blocks of 1000. Every block holds each source equally often, by its share of the weights rounded to a
thousandth, in an order shuffled by (seed, block). So the number of samples drawn from a source before a position is a
multiplication and a short count. Nothing is stored, any position is computed directly, and a run resumes exactly from
its position, also with another number of ranks.

Each source is read epoch by epoch, every sample once an epoch, in an order shuffled by (seed, source, epoch).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .permutation import permuted

BLOCK = 1000


@dataclass(frozen=True)
class Source:
    """A source with `length` samples an epoch; `weight` is relative to the other sources."""

    length: int
    weight: float = 1.0


@dataclass(frozen=True)
class Draw:
    """Sample `index` of epoch `epoch` of `source`."""

    source: str
    epoch: int
    index: int


class Mixture:
    """An endless stream of samples from all sources."""

    def __init__(self, sources: Mapping[str, Source], seed: int = 0) -> None:
        for name, source in sources.items():
            if source.length < 1:
                raise ValueError(f"{name}.length = {source.length}: a source has at least one sample")
            if not 0 <= source.weight < float("inf"):
                raise ValueError(f"{name}.weight = {source.weight}: must be a number >= 0")
        self.sources = {name: source for name, source in sources.items() if source.weight > 0}
        if not self.sources:
            raise ValueError(f"sources = {list(sources)}: at least one needs a weight above 0")
        self.seed = seed
        self.quota = _quota(self.sources)
        self._names = list(self.sources)
        self._block: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def draw(self, position: int) -> Draw:
        """The sample at `position`, counted over all ranks."""
        if position < 0:
            raise IndexError(f"position = {position}: must be >= 0")
        number, place = divmod(position, BLOCK)
        block = self._sources_of_block(number)
        name = self._names[block[place]]
        taken = number * self.quota[name] + int(np.count_nonzero(block[:place] == block[place]))
        length = self.sources[name].length
        epoch, index = divmod(taken, length)
        return Draw(name, epoch, permuted(index, length, f"mixture/{self.seed}/{name}/{epoch}"))

    def positions_of_epoch(self, name: str) -> int:
        """Positions until every sample of `name` has been drawn once, rounded up to whole blocks."""
        if name not in self.quota:
            raise ValueError(f"name = {name!r}: the mixture has {', '.join(self.quota)}")
        return -(-self.sources[name].length // self.quota[name]) * BLOCK

    @property
    def epoch(self) -> int:
        """Positions in a pass through the first source."""
        name, source = next(iter(self.sources.items()))
        return source.length if len(self.sources) == 1 else self.positions_of_epoch(name)

    def _sources_of_block(self, number: int) -> NDArray[np.int64]:
        if self._block[0] != number:
            order = np.repeat(np.arange(len(self._names)), list(self.quota.values()))
            shuffled = order[[permuted(place, BLOCK, f"block/{self.seed}/{number}") for place in range(BLOCK)]]
            self._block = (number, shuffled)
        return self._block[1]


def _quota(sources: Mapping[str, Source]) -> dict[str, int]:
    """Samples of each source in a block, by the largest-remainder method."""
    total = sum(source.weight for source in sources.values())
    exact = {name: source.weight / total * BLOCK for name, source in sources.items()}
    quota = {name: int(samples) for name, samples in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (quota[name] - exact[name], name))
    for name in by_remainder[: BLOCK - sum(quota.values())]:
        quota[name] += 1
    for name, samples in quota.items():
        if not samples:
            raise ValueError(
                f"{name}.weight = {sources[name].weight}: under a thousandth of all weights, it would never be drawn; "
                "raise it or set it to 0"
            )
    return quota

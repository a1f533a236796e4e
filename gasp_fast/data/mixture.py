"""Interleaves data sources by weight: position → (source, epoch, index). Knows lengths and weights, not samples.

Positions are cut into blocks of 1000. Every block holds each source equally often, its share of the weights to a
thousandth, in an order shuffled by (seed, block). So how many samples a source has given before any position is a
multiplication and a short count: nothing is stored, any position can be asked for at once, and a run resumes exactly
from the one number it has consumed, even on another number of ranks.

Each source is walked epoch by epoch, every sample once an epoch, in an order shuffled by (seed, source, epoch).
Rank `r` of `w` takes positions `r, r + w, r + 2 w, …`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .permutation import permuted

BLOCK = 1000


@dataclass(frozen=True)
class Source:
    """`length` samples an epoch, `weight` relative to the other sources."""

    length: int
    weight: float = 1.0


@dataclass(frozen=True)
class Draw:
    """Sample `index` of the `epoch`-th walk through `source`."""

    source: str
    epoch: int
    index: int


class Mixture:
    """What stands at each position of an endless stream that mixes the sources."""

    def __init__(self, sources: Mapping[str, Source], seed: int = 0) -> None:
        for name, source in sources.items():
            if source.length < 1:
                raise ValueError(f"{name}.length = {source.length}: a source needs at least one sample")
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
        """What stands at `position`, counted over all ranks."""
        if position < 0:
            raise IndexError(f"position = {position}: must be >= 0")
        number, place = divmod(position, BLOCK)
        block = self._sources_of_block(number)
        name = self._names[block[place]]
        taken = number * self.quota[name] + int(np.count_nonzero(block[:place] == block[place]))
        length = self.sources[name].length
        epoch, index = divmod(taken, length)
        return Draw(name, epoch, permuted(index, length, f"mixture/{self.seed}/{name}/{epoch}"))

    def share(self, rank: int = 0, ranks: int = 1, start: int = 0) -> Iterator[Draw]:
        """The endless stream of one rank, from the global position `start` on."""
        if not 0 <= rank < ranks:
            raise ValueError(f"rank = {rank}: must lie in 0..{ranks - 1}")
        position = start + rank
        while True:
            yield self.draw(position)
            position += ranks

    def positions_of_epoch(self, name: str) -> int:
        """How many positions it takes until `name` has been walked once, to the end of a block."""
        if name not in self.quota:
            raise ValueError(f"name = {name!r}: the mixture has {', '.join(self.quota)}")
        return -(-self.sources[name].length // self.quota[name]) * BLOCK

    def _sources_of_block(self, number: int) -> NDArray[np.int64]:
        if self._block[0] != number:
            order = np.repeat(np.arange(len(self._names)), list(self.quota.values()))
            shuffled = order[[permuted(place, BLOCK, f"block/{self.seed}/{number}") for place in range(BLOCK)]]
            self._block = (number, shuffled)
        return self._block[1]


def _quota(sources: Mapping[str, Source]) -> dict[str, int]:
    """Places of each source in a block, by largest remainder."""
    total = sum(source.weight for source in sources.values())
    exact = {name: source.weight / total * BLOCK for name, source in sources.items()}
    quota = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (quota[name] - exact[name], name))
    for name in by_remainder[: BLOCK - sum(quota.values())]:
        quota[name] += 1
    for name, places in quota.items():
        if not places:
            raise ValueError(
                f"{name}.weight = {sources[name].weight}: under a thousandth of all weights, it would never be drawn; "
                "raise it or set it to 0"
            )
    return quota

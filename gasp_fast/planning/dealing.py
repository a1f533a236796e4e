"""Deals the sequences of an optimiser step to ranks and micro-batches by predicted cost.

All ranks wait for the slowest, and sequences are of unequal length. The sequences of a step are fixed. They are divided
in such a way that the ranks take about equally long:

1. Neighbours in length form micro-batches, so that little is padded: `micro_batch_size` sequences each, or at most
   `tokens_at_once` tokens each. In the second case as many micro-batches are made as there are ranks, or twice as many,
   and so on, and all cost about the same or have as many sequences. What is done first is chosen. With `packing`
   nothing is padded: tokens and cost of a micro-batch are the sums of those of its sequences.
2. The costliest micro-batch goes to the rank that has least to do, and so on.
3. The slowest rank exchanges a sequence with another rank, as long as that helps.

Each rank gets the same number of micro-batches; some may be empty. The result is a function of the arguments, so each
rank computes it by itself, in some milliseconds for 128 sequences on 32 ranks. Seconds are counted in whole
nanoseconds: sums of floating-point numbers can differ between processors, and then ranks would deal differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from .micro_batch_time import MicroBatchSeconds
from .training_setup import SequenceSize, TrainingSetup

MORE = 3  # numbers of micro-batches that are tried, from the smallest possible one on
HALVINGS = 12  # of the interval in which the least cost of the costliest micro-batch is searched
EXCHANGES = 64  # at most
GAIN = 1000  # an exchange must save more than the slowest rank's time divided by this
NANO = 1_000_000_000
NEVER = np.iinfo(np.int64).max // 4  # nanoseconds, for what is not allowed

MicroBatch = list[int]  # numbers of its sequences, counted from the longest one of the step, ascending


@dataclass(frozen=True, kw_only=True)
class Division:
    """Into what a step is divided."""

    ranks: int
    micro_batch_size: int = 1  # sequences of a micro-batch; not used with `tokens_at_once`
    tokens_at_once: int | None = None  # most tokens of a micro-batch, padding included; a longer sequence is alone
    packing: bool = False  # the sequences of a micro-batch are not padded
    meets_often: bool = False  # ranks wait for each other at every micro-batch, otherwise once a step

    @staticmethod
    def of(setup: TrainingSetup, ranks: int) -> Division:
        return Division(
            ranks=ranks,
            micro_batch_size=setup.micro_batch_size,
            tokens_at_once=setup.tokens_at_once,
            packing=setup.packing,
            meets_often=setup.sharding.stage >= 2,
        )


@dataclass(frozen=True)
class DealtStep:
    """The sequences of a step, by their places in it, in the micro-batches of each rank."""

    places: list[list[list[int]]]  # [ranks][micro-batches][sequences]
    nanoseconds: NDArray[np.int64]  # predicted, of each micro-batch, [ranks, micro-batches]
    padding: float  # seconds of these, in the mean of the ranks, in which padding is computed
    meets_often: bool

    @property
    def accumulation(self) -> int:
        """Micro-batches of each rank."""
        return self.nanoseconds.shape[1]

    @property
    def slowest(self) -> float:
        """Seconds until all ranks are done."""
        of_ranks = self.nanoseconds
        return int(of_ranks.max(0).sum() if self.meets_often else of_ranks.sum(1).max()) / NANO

    @property
    def mean(self) -> float:
        """Seconds that a rank computes, in the mean."""
        return int(self.nanoseconds.sum()) / len(self.nanoseconds) / NANO

    @property
    def useful_share(self) -> float:
        """The part of the step in which a rank computes, in the mean, and does not wait for the slowest."""
        return self.mean / self.slowest


def deal(sizes: Sequence[SequenceSize], division: Division, seconds: MicroBatchSeconds) -> DealtStep:
    """Deal the sequences of a step. Where micro-batches have a fixed size, it must divide them among the ranks."""
    step, limit = _Step(sizes, seconds, division.packing), division.tokens_at_once
    if limit is None:
        return step.dealt(step.of_equal_count(division.micro_batch_size), division)
    least = -(-len(step.of_few_micro_batches(limit)) // division.ranks)
    most = max(least, -(-len(sizes) // division.ranks))
    tried: list[tuple[float, DealtStep]] = []  # with the seconds that GPU and host need
    for number in range(least, min(most, least + MORE - 1) + 1):
        of_host = number * seconds.of_host
        if tried and min(tried, key=itemgetter(0))[0] <= of_host:
            break
        dealt = [step.dealt(divided, division) for divided in step.of_at_most(division.ranks * number, limit)]
        tried += [(max(one.slowest, of_host), one) for one in dealt]
    return min(tried, key=itemgetter(0))[1]


class _Step:
    """The sequences of a step, numbered from the longest to the shortest."""

    def __init__(self, sizes: Sequence[SequenceSize], seconds: MicroBatchSeconds, packing: bool) -> None:
        self.packing = packing
        self.places = sorted(range(len(sizes)), key=lambda place: -sizes[place].tokens)  # stable
        ordered = [sizes[place] for place in self.places]
        # Nanoseconds of each sequence; of the decoder if it is the longest one of its micro-batch, which descends.
        self.unpadded = np.array([round(NANO * seconds.unpadded(size)) for size in ordered])
        self.padded = np.array([round(NANO * seconds.padded(size.tokens)) for size in ordered])
        if packing:  # each has the decoder's time of its own length, whichever is the longest
            self.unpadded, self.padded = self.unpadded + self.padded, np.zeros_like(self.padded)
        self.tokens = np.array([size.most_tokens or size.tokens for size in ordered])
        self.by_micro_batch = round(NANO * seconds.by_micro_batch)

    def cost(self, members: MicroBatch) -> int:
        """Nanoseconds of a micro-batch."""
        if not members:
            return 0
        return self.by_micro_batch + int(self.unpadded[members].sum() + len(members) * self.padded[members[0]])

    def padding(self, members: MicroBatch) -> int:
        """Nanoseconds of `cost` that would not be needed without padding."""
        return int(len(members) * self.padded[members[0]] - self.padded[members].sum()) if members else 0

    def most_tokens(self, members: MicroBatch) -> int:
        """Of a micro-batch, padding included."""
        tokens = self.tokens[members]
        return int(tokens.sum() if self.packing else len(members) * tokens.max())

    # ---- micro-batches ----------------------------------------------------------------------------------------------

    def of_equal_count(self, count: int) -> list[MicroBatch]:
        numbers = list(range(len(self.places)))
        return [numbers[start : start + count] for start in range(0, len(numbers), count)]

    def of_at_most(self, count: int, limit: int) -> Iterator[list[MicroBatch]]:
        """Two ways to make at most `count` micro-batches: of equal cost and, where the tokens allow, of equal size."""
        yield self.of_equal_cost(count, limit)
        of_equal_count = self.of_equal_count(-(-len(self.places) // count))
        if all(self.most_tokens(members) <= limit for members in of_equal_count):
            yield of_equal_count

    def of_few_micro_batches(self, limit: int) -> list[MicroBatch]:
        return self._filled(NEVER, limit)

    def of_equal_cost(self, count: int, limit: int) -> list[MicroBatch]:
        """At most `count` micro-batches, of which the costliest is as cheap as possible. So many must suffice."""
        if len(self.places) <= count:
            return self.of_equal_count(1)
        best = self.of_few_micro_batches(limit)
        costs = [self.cost(members) for members in best]
        below, above = sum(costs) // count // 2, max(costs)
        for _ in range(HALVINGS):
            middle = (below + above) // 2
            filled = self._filled(middle, limit)
            if len(filled) <= count:
                best, above = filled, middle
            else:
                below = middle
        return best

    def _filled(self, most: int, limit: int) -> list[MicroBatch]:
        """Micro-batches of neighbours with at most so many nanoseconds and tokens each, or of one sequence."""
        filled: list[MicroBatch] = []
        members: MicroBatch = []
        own, padded, longest, together = 0, 0, 0, 0
        costs = zip(self.unpadded.tolist(), self.padded.tolist(), self.tokens.tolist(), strict=True)
        for number, (unpadded, of_longest, tokens) in enumerate(costs):
            count = len(members) + 1
            fits = (together + tokens if self.packing else max(longest, tokens) * count) <= limit
            if not members or not fits or own + unpadded + count * padded > most:
                members, own, padded, longest, together = [], self.by_micro_batch, of_longest, 0, 0
                filled.append(members)
            members.append(number)
            own, longest, together = own + unpadded, max(longest, tokens), together + tokens
        return filled

    # ---- ranks ------------------------------------------------------------------------------------------------------

    def dealt(self, micro_batches: list[MicroBatch], division: Division) -> DealtStep:
        """Deal micro-batches to ranks. Empty ones are added until all ranks have the same number."""
        missing = -len(micro_batches) % division.ranks
        costliest_first = sorted([*micro_batches, *([] for _ in range(missing))], key=self.cost, reverse=True)
        if division.meets_often:  # those that run together should cost the same
            ranks = [costliest_first[rank :: division.ranks] for rank in range(division.ranks)]
        else:
            ranks = self._to_the_least_loaded(costliest_first, division.ranks)
            _Exchange(self, ranks, division.tokens_at_once).run()
            ranks = [sorted(of_rank, key=self.cost, reverse=True) for of_rank in ranks]
        return DealtStep(
            places=[[[self.places[number] for number in members] for members in of_rank] for of_rank in ranks],
            nanoseconds=np.array([[self.cost(members) for members in of_rank] for of_rank in ranks]),
            padding=sum(self.padding(members) for of_rank in ranks for members in of_rank) / division.ranks / NANO,
            meets_often=division.meets_often,
        )

    def _to_the_least_loaded(self, costliest_first: list[MicroBatch], count: int) -> list[list[MicroBatch]]:
        """Each micro-batch goes to the rank with the least to do so far that has not yet as many as it must have."""
        each = len(costliest_first) // count
        ranks: list[list[MicroBatch]] = [[] for _ in range(count)]
        loads = np.zeros(count, np.int64)
        for members in costliest_first:
            rank = int(loads.argmin())
            ranks[rank].append(members)
            loads[rank] = NEVER if len(ranks[rank]) == each else loads[rank] + self.cost(members)
        return ranks


class _Exchange:
    """Exchanges sequences between the slowest rank and others, in place. Sizes of micro-batches stay as they are."""

    def __init__(self, step: _Step, ranks: list[list[MicroBatch]], limit: int | None) -> None:
        self.step, self.limit = step, limit
        count = len(step.places)
        self.loads = np.zeros(len(ranks), np.int64)
        self.home: list[MicroBatch] = [[]] * count  # the micro-batch of each sequence
        self.rank, self.among = np.zeros(count, int), np.zeros(count, int)  # its rank; the sequences of its micro-batch
        # Of the longest other one there. With packing, `others_tokens` are those of all others.
        self.others_padded, self.others_tokens = np.zeros(count, np.int64), np.zeros(count, int)
        for rank, of_rank in enumerate(ranks):
            for members in filter(None, of_rank):
                self._enter(rank, members)

    def run(self) -> None:
        for _ in range(EXCHANGES):
            slowest = int(self.loads.argmax())
            mine, theirs = np.flatnonzero(self.rank == slowest)[:, None], np.flatnonzero(self.rank != slowest)
            if not mine.size or not theirs.size:
                return
            own = self.loads[slowest] + self._added(mine, theirs)  # [mine, theirs], after the exchange
            slower = np.maximum(own, self.loads[self.rank[theirs]] + self._added(theirs, mine))
            if slower.min() >= self.loads[slowest] - self.loads[slowest] // GAIN:
                return
            one, other = np.unravel_index(slower.argmin(), slower.shape)
            self._swap(int(mine[one, 0]), int(theirs[other]))

    def _added(self, old: NDArray[np.int64], new: NDArray[np.int64]) -> NDArray[np.int64]:
        """Nanoseconds that the micro-batch of `old` takes longer with `new` in its place; `NEVER` if it is too long."""
        step, among, others = self.step, self.among[old], self.others_padded[old]
        longer = np.maximum(others, step.padded[new]) - np.maximum(others, step.padded[old])
        added = step.unpadded[new] - step.unpadded[old] + among * longer
        if self.limit is None:
            return added
        others_tokens, own_tokens = self.others_tokens[old], step.tokens[new]
        tokens = others_tokens + own_tokens if step.packing else among * np.maximum(others_tokens, own_tokens)
        return np.where((tokens <= self.limit) | (among == 1), added, NEVER)

    def _swap(self, one: int, other: int) -> None:
        changed = [(int(self.rank[number]), self.home[number]) for number in (one, other)]
        for rank, members in changed:
            self.loads[rank] -= self.step.cost(members)
            members[:] = sorted({one: other, other: one}.get(number, number) for number in members)
        for rank, members in changed:
            self._enter(rank, members)

    def _enter(self, rank: int, members: MicroBatch) -> None:
        """Note what must be known of a micro-batch and its sequences."""
        self.loads[rank] += self.step.cost(members)
        self.rank[members], self.among[members] = rank, len(members)
        for values, others in ((self.step.padded, self.others_padded), (self.step.tokens, self.others_tokens)):
            longest, *rest = sorted(members, key=lambda number: -values[number])
            others[members] = values[longest]
            others[longest] = values[rest[0]] if rest else 0
        if self.step.packing:
            self.others_tokens[members] = self.step.tokens[members].sum() - self.step.tokens[members]
        for number in members:
            self.home[number] = members

"""Takes another sample where one cannot be read, and names the one that cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain, islice
from typing import Generic, TypeVar

from gasp_fast.data.errors import one_line
from gasp_fast.data.permutation import permuted

from .skipped import Skipped

TRIES = 64  # samples tried in place of an unreadable one; if none of them can be read, the run stops
Loaded = TypeVar("Loaded")


class Replacing(ABC, Generic[Loaded]):
    """A source of samples, `len` of them in an epoch, any of which may turn out to be unreadable."""

    kinds: tuple[str, ...]  # what is at fault where a sample cannot be read; sources may have more kinds of faults
    advice: str  # where nothing can be read
    root: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, epoch: int, index: int, position: int) -> Loaded:
        """Sample `index`. Raises if it cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The file and place of a sample, for messages."""

    def first_usable(
        self, epoch: int, index: int, position: int, skipped: Sequence[Skipped] = ()
    ) -> tuple[Loaded, int, tuple[Skipped, ...]]:
        """Sample `index`; if it cannot be read, or was `skipped`, another one in its place. With its index.

        The others follow in an order shuffled by `index`: its neighbours are of the same scene, shard or archive.
        """
        shuffled = (permuted(n, len(self), f"instead of {index}") for n in range(min(TRIES, len(self))))
        candidates = chain([index], (other for other in shuffled if other != index))
        skipped = list(skipped)
        for candidate in islice(candidates, len(skipped), None):
            try:
                return self.load(epoch, candidate, position), candidate, tuple(skipped)
            except Exception as error:  # whatever it is, it must not end the run
                skipped.append(self.fault(self.kinds[0], candidate, position, error))
        raise self.unusable(skipped)

    def fault(self, kind: str, index: int, position: int, error: Exception) -> Skipped:
        return Skipped(kind, f"{self.root}/{self.name(index)}", one_line(error), position)

    def unusable(self, skipped: Sequence[Skipped]) -> OSError:
        return OSError(f"{self.root}: none of {len(skipped)} samples can be used; the last, {skipped[-1]}{self.advice}")

"""Which shards of an annotation folder are there, whole, and made with its settings.

Many jobs write one folder, and any of them can die. The inventory is the merge: nothing has to be put together, but
nothing is used before every shard has been found. It reads the header of each shard, which also gives the length that
the file must have. The checksums are compared when a shard is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .parts import ranges
from .settings import AnnotationSettings
from .shard import ForeignShardError, open_shard, shard_path


@dataclass
class Inventory:
    """The shards `numbers` of a folder with `total` shards, sorted by what is wrong with them."""

    total: int
    numbers: Sequence[int]
    missing: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    foreign: list[int] = field(default_factory=list)  # made with other settings
    bytes: int = 0  # of the good ones
    failed: dict[int, str] = field(default_factory=dict)  # sequences without tracks, and why

    @property
    def bad(self) -> list[int]:
        return sorted([*self.missing, *self.damaged, *self.foreign])

    @property
    def fault(self) -> str:
        """What is wrong and how to mend it, in one line; empty if nothing is."""
        kinds = {"missing": self.missing, "damaged": self.damaged, "made with other settings": self.foreign}
        parts = []
        for kind, numbers in kinds.items():
            if len(numbers) == 1:
                parts.append(f"shard {numbers[0]} of {self.total} is {kind}")
            elif numbers:
                parts.append(f"{len(numbers):,} of {self.total:,} shards are {kind} ({ranges(numbers)})")
        return f"{', '.join(parts)}; finish with gasp-fast tracks" if parts else ""

    def unfinished_parts(self, count: int) -> list[int]:
        """The jobs of an array of `count` that have not finished."""
        return sorted({number % count for number in self.bad})


def take_inventory(folder: Path, settings: AnnotationSettings, numbers: Sequence[int] | None = None) -> Inventory:
    """Reads one listing of the folder, and the headers of the shards (by default all)."""
    found = Inventory(settings.shards, range(settings.shards) if numbers is None else numbers)
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries}
    for number in found.numbers:
        path = shard_path(folder, number)
        if path.name not in names:
            found.missing.append(number)
            continue
        try:
            _, header = open_shard(path, settings.digest)
            size = path.stat().st_size
        except ForeignShardError:
            found.foreign.append(number)
        except FileNotFoundError:
            found.missing.append(number)
        except (OSError, ValueError):
            found.damaged.append(number)
        else:
            found.bytes += size
            found.failed |= {int(index): reason for index, reason in header["failed"].items()}
    return found

"""Which shards of an annotation folder are there, whole, and made with its settings.

Many jobs write one folder, and any of them can die. The inventory is the merge: nothing has to be put together, but
nothing is used before every shard has been found. It reads the header of each shard, several at a time, because a file
system of a cluster takes long to open a file. The header also gives the length that the file must have. The checksums
are compared when a shard is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from .parts import ranges
from .settings import AnnotationSettings
from .shard import ForeignShardError, open_shard, shard_path

_THREADS = 16


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
    checksums: list[str] = field(default_factory=list)  # of the good ones, as their headers state them

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

    @property
    def digest(self) -> str:
        """A hash of the checksums."""
        return blake2b(" ".join(self.checksums).encode(), digest_size=16).hexdigest()

    def unfinished_parts(self, count: int) -> list[int]:
        """The jobs of an array of `count` that have not finished."""
        return sorted({number % count for number in self.bad})


def take_inventory(folder: Path, settings: AnnotationSettings, numbers: Sequence[int] | None = None) -> Inventory:
    """Reads one listing of the folder, and the headers of the shards (by default all)."""
    found = Inventory(settings.shards, range(settings.shards) if numbers is None else numbers)
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries}

    def look_at(number: int) -> tuple[str, int, dict[str, Any]]:
        """What is wrong with a shard, or nothing; its bytes; its header."""
        path = shard_path(folder, number)
        if path.name not in names:
            return "missing", 0, {}
        try:
            _, header = open_shard(path, settings.digest)
            return "", path.stat().st_size, header
        except ForeignShardError:
            return "foreign", 0, {}
        except FileNotFoundError:
            return "missing", 0, {}
        except (OSError, ValueError):
            return "damaged", 0, {}

    of_fault = {"missing": found.missing, "foreign": found.foreign, "damaged": found.damaged}
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, (fault, size, header) in zip(found.numbers, pool.map(look_at, found.numbers), strict=True):
            if fault:
                of_fault[fault].append(number)
                continue
            found.bytes += size
            found.checksums.append(str(header["checksum"]))
            found.failed |= {int(index): reason for index, reason in header["failed"].items()}
    return found

"""Reads annotations: the tracks of each sequence, by number.

A shard is opened when one of its sequences is read, and memory-mapped. When a process opens it for the first time, it
compares the checksum; after that it reads only the bytes of the sequence. Memory does not grow with the number of
annotations: at most `OPEN_SHARDS` are open, and a mapped file takes no memory that the system could not have back.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gasp_fast.data.tracks.build import Tracks

from .inventory import Inventory, take_inventory
from .settings import read_settings, read_skipped
from .shard import is_intact, open_shard, shard_path

OPEN_SHARDS = 16


@dataclass(frozen=True)
class Annotation:
    """The tracks of one sequence, as float32; no tracks if its scene could not be read."""

    scene: str
    tracks: Tracks


class AnnotationReader:
    """The annotations in a folder, by the number of the sequence. Can be pickled into loader workers."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.settings = read_settings(self.folder)
        except FileNotFoundError:
            raise OSError(f"{self.folder}: no annotations here; make them with gasp-fast tracks") from None
        self._shards: OrderedDict[int, Any] = OrderedDict()  # open, the least recently used first
        self._intact: set[int] = set()  # shards whose checksum this process has compared

    def __len__(self) -> int:
        return len(self.settings)

    def __getitem__(self, index: int) -> Annotation:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {self.folder}, which has {len(self)}")
        number, place = divmod(index, self.settings.shard_size)
        shard = self._shard(number)

        def rows(name: str, offsets: str) -> NDArray[Any]:
            start, end = (int(n) for n in shard.get_slice(offsets)[place : place + 2])
            table = shard.get_slice(name)
            if start == end:  # safetensors refuses an empty slice at the end of a tensor
                return np.empty((0, *table.get_shape()[1:]), np.float32)
            values: NDArray[Any] = table[start:end]
            return values

        frames = rows("frames", "frame_offsets")
        shape = (-1, len(frames))
        tracks = Tracks(
            frames=frames.astype(np.int64),
            query=rows("query", "track_offsets"),
            uv=rows("uv", "cell_offsets").reshape(*shape, 2),
            visible=rows("visible", "cell_offsets").astype(bool).reshape(shape),
            depth=rows("depth", "cell_offsets").reshape(shape),
        )
        return Annotation(self.settings.scenes[int(shard.get_slice("scene")[place : place + 1][0])].name, tracks)

    def _shard(self, number: int) -> Any:
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        path = shard_path(self.folder, number)
        if not path.is_file():
            raise OSError(f"{path}: shard {number} of {self.settings.shards} is missing; finish with gasp-fast tracks")
        shard, header = open_shard(path, self.settings.digest)
        if number not in self._intact:
            if not is_intact(shard, header):
                raise OSError(f"{path}: damaged (wrong checksum); delete it and run gasp-fast tracks again")
            self._intact.add(number)
        self._shards[number] = shard
        while len(self._shards) > OPEN_SHARDS:
            self._shards.popitem(last=False)
        return shard

    def check_complete(self, numbers: Sequence[int] | None = None) -> Inventory:
        """Raises, in one line, unless all shards (or those of `numbers`) are there, whole, and of these settings."""
        found = take_inventory(self.folder, self.settings, numbers)
        if found.fault:
            raise OSError(f"{self.folder}: {found.fault}")
        return found

    def skipped(self) -> dict[str, str]:
        """The scenes of the library that were left out, and why; empty for folders written before this was stored."""
        return read_skipped(self.folder)

    def verify(self) -> Iterator[tuple[int, bool]]:
        """Yields each shard's number and whether its arrays match the checksum."""
        for number in range(self.settings.shards):
            self._shards.pop(number, None)
            self._intact.discard(number)
            try:
                self._shard(number)
                yield number, True
            except (OSError, ValueError):
                yield number, False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": OrderedDict(), "_intact": set()}

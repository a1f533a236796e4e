"""Computes the tracks of all sequences of `AnnotationSettings` and writes them into shards.

A shard is a pure function of the settings and the scenes. Hence:

- Shards are computed in any order, by any number of processes or machines, and have the same bytes.
- A shard is written atomically: a killed run leaves complete shards only, and the next run computes the missing ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from gasp_fast.data.scenes.library import SceneChangedError, SceneEntry, check_unchanged
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import Tracks, build_tracks
from gasp_fast.files import write_atomically
from gasp_fast.processes import in_processes

from .inventory import take_inventory
from .parts import WHOLE, shards_in_part
from .settings import SETTINGS_FILE, AnnotationSettings, store_settings
from .shard import shard_arrays, shard_bytes, shard_path


def annotate(
    library: Path, folder: Path, settings: AnnotationSettings, workers: int = 1, part: tuple[int, int] = WHOLE
) -> Iterator[int]:
    """Computes the missing shards of `folder`, and yields the number of each shard once it exists.

    `part = (i, n)` computes only every n-th shard, so that n machines with a common disk share the work.
    """
    missing = prepare(folder, settings, part)
    yield from sorted(set(shards_in_part(settings.shards, part)) - set(missing))
    yield from write_shards(library, folder, settings, missing, workers)


def prepare(
    folder: Path,
    settings: AnnotationSettings,
    part: tuple[int, int],
    skipped: Mapping[str, str] | None = None,
    retry: bool = False,
) -> list[int]:
    """Stores the settings, deletes what killed processes left, and returns the shards of the part that are missing.

    A shard that is there has the right length and settings; its checksum is compared when it is read. With `retry`,
    shards that have sequences without tracks count as missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = shards_in_part(settings.shards, part)
    written = {shard_path(folder, number).name for number in numbers}
    if part == WHOLE:  # otherwise another machine may be writing the settings now
        written.add(SETTINGS_FILE)
    with os.scandir(folder) as entries:
        leftovers = [e.path for e in entries if e.name.endswith(".partial") and e.name[1:].rsplit(".", 2)[0] in written]
    for leftover in leftovers:
        Path(leftover).unlink(missing_ok=True)
    store_settings(folder, settings, skipped)
    found = take_inventory(folder, settings, numbers)
    failed = {index // settings.shard_size for index in found.failed} if retry else set()
    return sorted({*found.bad, *failed})


def write_shards(
    library: Path, folder: Path, settings: AnnotationSettings, numbers: Sequence[int], workers: int = 1
) -> Iterator[int]:
    """Computes shards and yields the number of each once it exists."""
    for number, _ in in_processes(partial(write_shard, library, folder, settings), numbers, workers):
        yield number


def write_shard(library: Path, folder: Path, settings: AnnotationSettings, number: int) -> None:
    """Computes and writes one shard. A sequence whose scene cannot be read has no tracks; the header says why."""
    sequences = SequenceTracks(library, settings)
    scenes: list[int] = []
    tracks: list[Tracks] = []
    failed: dict[str, str] = {}
    for index in settings.sequences_in_shard(number):
        scene, found, failure = sequences.compute(index)
        scenes.append(scene)
        tracks.append(found)
        if failure:
            failed[str(index)] = failure
    content = shard_bytes(shard_arrays(scenes, tracks), settings.digest, failed)
    write_atomically(shard_path(folder, number), content)


class SequenceTracks:
    """Computes the tracks of sequences by number. The last scene stays open, because sequences run scene by scene."""

    def __init__(self, library: Path, settings: AnnotationSettings) -> None:
        self.library, self.settings = library, settings
        self._open = lru_cache(maxsize=1)(self._open_unchanged)

    def compute(self, index: int) -> tuple[int, Tracks, str]:
        """The number of its scene, its tracks, and why it has none if its scene cannot be read."""
        drawn = self.settings.sampler.draw(*divmod(index, len(self.settings.sampler)))
        entry = self.settings.scenes[drawn.scene]
        try:
            scene = self._open(entry)
            if isinstance(scene, str):
                raise OSError(scene)
            return drawn.scene, build_tracks(scene, drawn.frames, grid=self.settings.grid, keep=self.settings.keep), ""
        except SceneChangedError:
            raise
        except (OSError, ValueError) as error:
            reason = str(error).replace(f"{self.library}{os.sep}", "")  # bytes must not depend on the library's path
            return drawn.scene, _no_tracks(drawn.frames), reason if entry.name in reason else f"{entry.name}: {reason}"

    def _open_unchanged(self, entry: SceneEntry) -> Scene | str:
        """The scene, or why it cannot be read. A scene that changed since the settings were made is an error."""
        try:
            scene = open_scene(self.library / entry.name)
            check_unchanged(scene, entry)
            return scene
        except SceneChangedError:
            raise
        except (OSError, ValueError) as error:
            return str(error)


def _no_tracks(frames: Sequence[int]) -> Tracks:
    count = len(frames)
    return Tracks(
        frames=np.array(frames, np.int64),
        query=np.empty((0, 2)),
        uv=np.empty((0, count, 2)),
        visible=np.empty((0, count), bool),
        depth=np.empty((0, count)),
    )

"""Computes the tracks of all sequences of `AnnotationSettings` and writes them into shards.

A shard is a pure function of the settings and the scenes. Hence:

- Shards are computed in any order, by any number of processes or machines, and have the same bytes.
- A shard is written atomically: a killed run leaves complete shards only, and the next run computes the missing ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from safetensors import safe_open

from gasp_fast.data.scenes.library import SceneChangedError, SceneEntry, check_unchanged
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import Tracks, build_tracks
from gasp_fast.files import sweep_partials, write_atomically
from gasp_fast.processes import in_processes

from .parts import shards_in_part
from .settings import SETTINGS_FILE, AnnotationSettings, store_settings
from .shard import read_header, shard_arrays, shard_bytes, shard_path


def annotate(
    library: Path, folder: Path, settings: AnnotationSettings, workers: int = 1, part: tuple[int, int] = (0, 1)
) -> Iterator[int]:
    """Computes the missing shards of `folder`, and yields the number of each shard once it exists.

    `part = (i, n)` computes only every n-th shard, so that n machines with a common disk share the work.
    """
    numbers = shards_in_part(settings.shards, part)
    if part == (0, 1):
        sweep_partials(folder / SETTINGS_FILE)  # with several parts, another machine may be writing it now
    store_settings(folder, settings)
    missing = []
    for number in numbers:
        if _is_valid(folder, number, settings):
            yield number
        else:
            missing.append(number)
            sweep_partials(shard_path(folder, number))
    for number, _ in in_processes(partial(write_shard, library, folder, settings), missing, workers):
        yield number


def write_shard(library: Path, folder: Path, settings: AnnotationSettings, number: int) -> None:
    """Computes and writes one shard. A sequence whose scene cannot be read has no tracks; the header says why."""
    scenes: list[int] = []
    tracks: list[Tracks] = []
    failed: dict[str, str] = {}
    open_scene_of = lru_cache(maxsize=1)(partial(_open_unchanged, library))
    for index in settings.sequences_in_shard(number):
        drawn = settings.sampler.draw(*divmod(index, len(settings.sampler)))
        entry = settings.scenes[drawn.scene]
        scene = open_scene_of(entry)
        scenes.append(drawn.scene)
        try:
            if isinstance(scene, str):
                raise OSError(scene)
            tracks.append(build_tracks(scene, drawn.frames, grid=settings.grid, keep=settings.keep))
        except (OSError, ValueError) as error:
            reason = str(error).replace(f"{library}{os.sep}", "")  # the bytes must not depend on the library's path
            failed[str(index)] = reason if entry.name in reason else f"{entry.name}: {reason}"
            tracks.append(_no_tracks(drawn.frames))
    content = shard_bytes(shard_arrays(scenes, tracks), settings.digest, failed)
    write_atomically(shard_path(folder, number), content)


def _open_unchanged(library: Path, entry: SceneEntry) -> Scene | str:
    """The scene, or the reason why it cannot be read. A scene that changed since the settings were made is an error."""
    try:
        scene = open_scene(library / entry.name)
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


def _is_valid(folder: Path, number: int, settings: AnnotationSettings) -> bool:
    """Whether the shard exists, is complete and belongs to these settings. Does not compute its checksum."""
    try:
        with safe_open(shard_path(folder, number), "numpy") as shard:
            header = read_header(shard)
    except Exception:  # safetensors raises its own exception types on damaged files
        return False
    return header.get("plan") == settings.digest

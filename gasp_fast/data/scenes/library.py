"""Finds the scenes under a folder, with their numbers of frames and digests.

A scene's name is its path under the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np

from gasp_fast.processes import in_processes

from .computed_depth import computed_folder
from .formats import contents, is_scene, known_files
from .library_file import place_of
from .open import open_scene
from .scene import Scene

DEEPEST = 4  # folders between the library and a scene; DL3DV has 1K/<hash>
DIGEST_SIZE, EARLIER_SIZE = 10, 8  # bytes
FEWEST_FOR_PROCESSES = 200  # scenes; fewer are opened before other processes have started


@dataclass(frozen=True)
class SceneEntry:
    """One scene of a library, as it was when `survey` opened it."""

    name: str  # path under the library; "." if the library itself is a scene
    frames: int
    digest: str


def find_scenes(library: Path) -> list[str]:
    """Names of all scenes under `library`, sorted; `["."]` if it is a scene itself.

    Searches `DEEPEST` levels of folders, but not inside scenes and not in hidden folders (unfinished work).
    """
    folder = place_of(library).root
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    names = sorted(path.relative_to(folder).as_posix() for path in _scenes_under(folder, DEEPEST))
    if not names:
        raise OSError(
            f"{folder}: no scene here or up to {DEEPEST} folders below. Looked for {known_files()}. It has "
            f"{contents(folder)}"
        )
    return names


def folder_name(library: Path, name: str) -> str:
    """The name of the scene's own folder. The held-out split depends on it."""
    return place_of(library).root.resolve().name if name == "." else Path(name).name


def _scenes_under(folder: Path, depth: int) -> Iterator[Path]:
    if is_scene(folder):
        yield folder
    elif depth:
        with os.scandir(folder) as entries:  # its entries say which are folders, without a call for each
            children = [entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry)]
        for child in children:
            yield from _scenes_under(folder / child, depth - 1)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def scene_digest(scene: Scene) -> str:
    """A hash of frame names, poses and cameras: it changes when a frame is added, removed, renamed or moved, or when
    its camera does. Decodes nothing."""
    digest = _hash_of_poses(scene, DIGEST_SIZE)
    for frame in scene.frames:
        digest.update(np.ascontiguousarray(frame.intrinsics, np.float64).tobytes())
        digest.update(repr((frame.camera_size, frame.distortion)).encode())
    return digest.hexdigest()


def has_digest(scene: Scene, digest: str) -> bool:
    """Whether `scene` is the one of a digest. Earlier versions wrote shorter ones, of names and poses alone."""
    earlier = len(digest) == 2 * EARLIER_SIZE
    return digest == (_hash_of_poses(scene, EARLIER_SIZE).hexdigest() if earlier else scene_digest(scene))


def in_order_of_characters(scene: Scene) -> Scene:
    """The scene with frames sorted as earlier versions did: `10` before `2`."""
    return replace(scene, frames=tuple(sorted(scene.frames, key=lambda frame: frame.name)))


def _hash_of_poses(scene: Scene, size: int) -> blake2b:
    digest = blake2b(digest_size=size)
    for index, name in enumerate(scene.frame_names):
        # On disk, names are bytes: those that are not UTF-8 are read as halves of surrogate pairs.
        digest.update(name.encode(errors="surrogateescape") + b"\0")
        digest.update(np.ascontiguousarray(scene.pose(index), np.float64).tobytes())
    return digest


def check_unchanged(scene: Scene, entry: SceneEntry) -> None:
    """Raises unless the frames, poses and cameras of `scene` are those of its `entry`. Opens no file."""
    if not has_digest(scene, entry.digest):
        what = "other names, poses or cameras"
        if len(scene) != entry.frames:
            what = f"{len(scene)} frames instead of {entry.frames}"
        elif has_digest(in_order_of_characters(scene), entry.digest):
            what = "frame 2 now comes before frame 10; earlier versions sorted names by their characters"
        raise SceneChangedError(f"{scene.root}: the scene has changed ({what}); make its annotations again")


class SceneChangedError(ValueError):
    """A scene is not what it was when its annotations were begun."""


def survey(library: Path, names: Sequence[str], workers: int = 1) -> Iterator[SceneEntry | tuple[str, str]]:
    """Yields an entry for each scene, in order, or its name and the reason why it cannot be used.

    A scene is opened, but no frame of it. With `workers`, that many processes open them.
    """
    enter = partial(_enter, library)
    if workers == 1 or len(names) < FEWEST_FOR_PROCESSES:
        yield from map(enter, names)
        return
    waiting = iter(names)
    done: dict[str, SceneEntry | tuple[str, str]] = {}
    name = next(waiting)
    for finished, entry in in_processes(enter, names, workers):
        done[finished] = entry
        while name in done:
            yield done.pop(name)
            name = next(waiting, "")


def _enter(library: Path, name: str) -> SceneEntry | tuple[str, str]:
    root = library / name
    try:
        scene = open_scene(root)
        if scene.has_depth:
            return SceneEntry(name, len(scene), scene_digest(scene))
        stopped = computed_folder(scene).is_dir()
        cure = "gasp-fast depth was stopped here; run it again:" if stopped else "make it with"
        return name, f"no depth; {cure} gasp-fast depth {root}"
    except (OSError, ValueError) as error:
        return name, str(error)

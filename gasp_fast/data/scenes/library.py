"""A folder of scenes: which there are, how long each is, and a digest that changes when one changes.

Knows folders and `open_scene`; knows neither sequences nor tracks. Scenes are named by their path under the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from .formats import is_scene, known_marks
from .open import open_scene
from .scene import Scene

DEEPEST = 4  # how many folders below the library a scene may lie: DL3DV keeps its own in 1K/<hash>


@dataclass(frozen=True)
class SceneEntry:
    """One scene of a library as it was found."""

    name: str  # path under the library; "." when the library is itself a scene
    frames: int
    digest: str


def find_scenes(library: Path) -> list[str]:
    """Names of all scenes under `library`, sorted; `["."]` if it is a scene itself.

    Folders may be nested, `DEEPEST` of them. Scenes inside a scene are not looked for, and hidden folders (unfinished
    work) are passed over.
    """
    if not library.is_dir():
        raise FileNotFoundError(f"{library}: no such folder")
    names = sorted(path.relative_to(library).as_posix() for path in _scenes_under(library, DEEPEST))
    if not names:
        raise OSError(f"{library}: no scene here or up to {DEEPEST} folders below. Looked for {known_marks()}")
    return names


def own_name(library: Path, name: str) -> str:
    """The name of a scene's own folder, by which scenes are held out."""
    return library.resolve().name if name == "." else Path(name).name


def _scenes_under(folder: Path, depth: int) -> Iterator[Path]:
    if is_scene(folder):
        yield folder
    elif depth:
        for child in folder.iterdir():
            if child.is_dir() and not child.name.startswith("."):
                yield from _scenes_under(child, depth - 1)


def digest_of(scene: Scene) -> str:
    """Changes when frames are added, removed, renamed or given another pose; costs no decoding."""
    digest = blake2b(digest_size=8)
    for index, name in enumerate(scene.frame_names):
        digest.update(name.encode() + b"\0" + np.ascontiguousarray(scene.pose(index), np.float64).tobytes())
    return digest.hexdigest()


def survey(library: Path, names: Iterable[str]) -> Iterator[SceneEntry | tuple[str, str]]:
    """An entry for each scene, or its name and the reason why it cannot be used."""
    for name in names:
        try:
            scene = open_scene(library / name)
            if not scene.has_depth:
                raise ValueError(f"no depth; make it with gasp-fast depth {library / name}")
            yield SceneEntry(name, len(scene), digest_of(scene))
        except (OSError, ValueError) as error:
            yield name, str(error)

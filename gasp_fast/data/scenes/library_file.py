"""`library.json`: scenes that lie elsewhere, with what may be read beside them. It is given in place of their folder.

    {"scenes": "/data/dl3dv", "computed_depth": "depth", "follow_links": ["/data/photographs"]}

`scenes` is the folder of the scenes, which may be read-only. `computed_depth` is a folder with the depth that
`gasp-fast depth` has computed for them, under the names of the scenes; without it, depth lies in the scenes. Links out
of a scene are followed if they lead into one of the folders `follow_links`, and refused otherwise. Paths are relative
to the file.

A path that goes on after the file is the path of a scene: `library.json/1K/hash`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gasp_fast.data.errors import shown
from gasp_fast.files import read_json, write_atomically

SUFFIX = ".json"
NAME = "library.json"
KEYS = ("scenes", "computed_depth", "follow_links")


@dataclass(frozen=True)
class Place:
    """Where a folder of scenes, or one scene, really lies."""

    root: Path
    computed_depth: Path | None = None  # of this scene; None: inside of it
    follow_links: tuple[Path, ...] = ()


def place_of(path: Path) -> Place:
    """The place that `path` means: itself, unless it is or goes through a library file. Most paths cost no call."""
    for file in (path, *path.parents):
        if file.suffix.lower() == SUFFIX and file.is_file():
            return _read(file, path.relative_to(file))
    return Place(path)


def write_library_file(path: Path, scenes: Path, computed_depth: Path) -> None:
    content = {"scenes": str(scenes.resolve()), "computed_depth": str(computed_depth)}
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _read(file: Path, name: Path) -> Place:
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("scenes"), str):
        raise ValueError(f'{file}: not a library; it holds {{"scenes": "FOLDER"}}')
    if unknown := content.keys() - set(KEYS):
        raise ValueError(f"{file}: key {shown(sorted(unknown)[0])} is unknown; known are {', '.join(KEYS)}")
    depth, links = content.get("computed_depth"), content.get("follow_links", [])
    if not (depth is None or isinstance(depth, str)):
        raise ValueError(f"{file}: computed_depth = {shown(depth)} is not a folder")
    if not isinstance(links, list) or not all(isinstance(link, str) and link for link in links):
        raise ValueError(f"{file}: follow_links = {shown(links)} is not a list of folders")
    base = file.parent
    return Place(
        base / content["scenes"] / name,
        None if depth is None else base / depth / name,
        tuple(base / link for link in links),
    )

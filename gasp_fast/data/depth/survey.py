"""Which scenes of a library still need depth: what `gasp-fast depth` has done already, and what it has to do.

A scene is done when its `computed_depth/index.json` was written for the frames and poses that it has now, and all maps
that the index names are there. The index is written last, so a killed run leaves none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gasp_fast.data.scenes.computed_depth import FOLDER, INDEX, computed_files, computed_folder, read_index
from gasp_fast.data.scenes.library import has_digest, in_order_of_characters
from gasp_fast.data.scenes.open import open_scene

BYTES_OF_PIXEL = 2  # of a map in float16, which holds nearly all scenes


@dataclass(frozen=True)
class DepthState:
    """What is known of a scene's depth before anything is computed."""

    frames: int
    bytes: int  # of the maps of all frames, at the size of the photographs
    source: str  # "own": it came with the scene; "mvs" or "model NAME": computed; "": to be computed
    usable: int = 0  # frames with computed depth
    why: str = ""  # why computed depth has to be computed again

    @property
    def done(self) -> bool:
        return bool(self.source) and not self.why

    def __str__(self) -> str:
        if self.source == "own":
            return "comes with depth; nothing to do"
        if self.done:
            return f"has computed depth already ({self.source}, {self.usable} usable frames); --force computes it again"
        return f"to be computed{': ' if self.why else ''}{self.why}"


def depth_state(root: Path) -> DepthState:
    """Looks at a scene's folder and index. Decodes nothing."""
    scene = open_scene(root)
    width, height = scene.image_size(0)
    size = len(scene) * width * height * BYTES_OF_PIXEL
    folder, files = computed_folder(scene), computed_files(scene)
    path = folder / INDEX
    if not files.is_file(path):
        return DepthState(len(scene), size, "own" if scene.has_depth else "")
    index = read_index(path)
    gone = [fit.file for fit in index.frames.values() if fit.file and not files.is_file(folder / fit.file)]
    why = ""
    # Maps belong to frames by name, whatever the order in which an earlier version sorted the names.
    if index.scene and not any(has_digest(one, index.scene) for one in (scene, in_order_of_characters(scene))):
        why = "its frames, poses or cameras have changed"
    elif gone:
        why = f"{FOLDER}/{gone[0]} is missing"
    elif not index.scene and not index.usable:  # before indices named their scene, such a scene was tried every time
        why = "no frame was usable"
    return DepthState(len(scene), size, index.made_by, len(index.usable), why)

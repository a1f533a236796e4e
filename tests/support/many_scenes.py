"""Libraries of many small scenes, made of links to the files of one, and what opening them asks of the file system."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from support.box_world import CAMERA, BoxWorld
from support.scene_formats import write_colmap, write_dl3dv, write_scene_as

from gasp_fast.data.depth.compute import depth_from_mvs
from gasp_fast.data.scenes.formats import FORMATS, rgbd, scannet
from gasp_fast.data.scenes.formats.pose_files import pack_poses
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import without_depth

COMPUTED, PACKED = "dl3dv with computed depth", "rgbd with packed poses"
KINDS = (*(module.NAME for module in FORMATS), COMPUTED, PACKED)
ONE_FILE_A_FRAME = (rgbd.NAME, scannet.NAME)  # poses lie in one file a frame, which has to be read


def write_library(kind: str, library: Path, scenes: int, frames: int) -> None:
    """Writes `scenes` scenes of `frames` frames of 45 x 27 pixels; each has files of its own only where it must."""
    first = library / "scene-0000"
    first.mkdir(parents=True)
    small = BoxWorld(frames=frames, camera=CAMERA / 8 + np.diag([0, 0, 7 / 8]), size=(45, 27))
    source = open_scene(small.write_rgbd(library.with_name(f"{library.name}-source")))
    if kind == COMPUTED:
        write_dl3dv(without_depth(source), first)
        write_colmap(source, first / "dense")
        depth_from_mvs(open_scene(first))
    elif kind == PACKED:
        write_scene_as(rgbd.NAME, source, first)
        pack_poses(first)
    else:
        write_scene_as(kind, source, first)
    for number in range(1, scenes):
        shutil.copytree(first, library / f"scene-{number:04d}", copy_function=os.link)


class Calls:
    """Calls to the file system that look up, open or list something."""

    def __init__(self) -> None:
        self.count = 0
        self.by_name: dict[str, int] = {}
        self.active = False

    def add(self, name: str) -> None:
        if self.active:
            self.count += 1
            self.by_name[name] = self.by_name.get(name, 0) + 1


_AUDITED = ("open", "os.scandir", "os.listdir")
_ALL: list[Calls] = []


def _hook(event: str, _: object) -> None:
    if event in _AUDITED:
        for calls in _ALL:
            calls.add(event)


@contextmanager
def counted_calls() -> Iterator[Calls]:
    """Counts what Python code does in the block: opening, listing, stat and lstat."""
    if not _ALL:
        sys.addaudithook(_hook)  # stays; without an active counter it does nothing
    calls = Calls()
    _ALL.append(calls)
    originals = {name: getattr(os, name) for name in ("stat", "lstat")}

    def counting(name: str):
        def call(*arguments, **options):
            calls.add(name)
            return originals[name](*arguments, **options)

        return call

    for name in originals:
        setattr(os, name, counting(name))
    calls.active = True
    try:
        yield calls
    finally:
        calls.active = False
        for name, original in originals.items():
            setattr(os, name, original)

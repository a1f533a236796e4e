"""Open scenes and decoded frames stay within stated bounds, however much of a library a process reads."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from support.many_scenes import KINDS, write_library

from gasp_fast.data.scenes import open_scenes
from gasp_fast.data.scenes.frame_cache import DEFAULT_BYTES
from gasp_fast.data.scenes.library import SceneEntry, find_scenes, survey
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.open_scenes import FRAME_BYTES, OPEN_BYTES, OpenScenes


@pytest.fixture
def library(tmp_path: Path) -> Path:
    write_library("vggt", tmp_path / "library", 5, 6)
    return tmp_path / "library"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the scenes that are opened, in order."""
    names: list[str] = []
    monkeypatch.setattr(open_scenes, "open_scene", lambda root: names.append(root.name) or open_scene(root))
    return names


def test_the_least_recently_used_scene_closes_first(library: Path, opened: list[str]) -> None:
    scenes = OpenScenes(library, limit_bytes=3 * 6 * FRAME_BYTES)
    a, b, c, d, _ = find_scenes(library)
    for name in (a, b, c, a, d, a, c, b):
        assert scenes[name].root.name == name
        assert len(scenes) <= 3 and scenes.held_bytes <= scenes.limit_bytes
    assert opened == [a, b, c, d, b]


def test_a_scene_beyond_the_bound_is_open_alone(library: Path, opened: list[str]) -> None:
    scenes = OpenScenes(library, limit_bytes=1)
    for name in find_scenes(library):
        assert len(scenes[name]) == len(scenes[name]) == 6 and len(scenes) == 1
    assert opened == find_scenes(library)


def test_loader_processes_open_scenes_of_their_own(library: Path) -> None:
    scenes = OpenScenes(library)
    name = find_scenes(library)[0]
    assert len(scenes[name]) and len(pickle.loads(pickle.dumps(scenes))) == 0


def test_a_scene_that_is_not_what_its_entry_says_never_opens(library: Path) -> None:
    entries = {entry.name: entry for entry in survey(library, find_scenes(library)) if isinstance(entry, SceneEntry)}
    entries["scene-0001"] = SceneEntry("scene-0001", 6, "0" * 16)
    scenes = OpenScenes(library, entries=entries)
    assert len(scenes["scene-0000"]) == 6
    for _ in range(2):
        with pytest.raises(ValueError, match="scene-0001: the scene has changed"):
            scenes["scene-0001"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_of_an_open_scene_takes_no_more_than_is_stated(kind: str, tmp_path: Path) -> None:
    write_library(kind, tmp_path / "library", 1, 60)
    root = tmp_path / "library" / "scene-0000"
    open_scene(root)  # imports what the reader needs
    gc.collect()
    tracemalloc.start()
    try:
        scene = open_scene(root)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 0.3 * FRAME_BYTES < held / len(scene) < FRAME_BYTES


READER = """
import os, pathlib, sys
import numpy as np
from PIL import Image
from gasp_fast.data.scenes.frame_cache import DECODED
from gasp_fast.data.scenes.open_scenes import OpenScenes
library, limit = pathlib.Path(sys.argv[1]), int(sys.argv[2])
os.makedirs(library / "source")
np.save(library / "source" / "depth.npy", np.ones((540, 960), np.float32))
Image.new("RGB", (960, 540)).save(library / "source" / "image.png")
names = [f"scene-{n}" for n in range(20)]
for name in names:
    for part, file in (("images", "image.png"), ("depths", "depth.npy")):
        os.makedirs(library / name / part)
        for n in range(20):
            os.link(library / "source" / file, library / name / part / f"{n}{pathlib.Path(file).suffix}")
    (library / name / "image_names.json").write_text(str([f"{n}.png" for n in range(20)]).replace("'", '"'))
    np.save(library / name / "cam_from_worlds.npy", np.tile(np.eye(4)[:3], (20, 1, 1)))
    np.save(library / name / "intrinsics.npy", np.tile(np.diag([500.0, 500, 1]), (20, 1, 1)))
def private():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
DECODED.resize(limit)
scenes = OpenScenes(library)
scenes[names[0]].depth(0), scenes[names[0]].image(0)
before, most, decoded = private(), 0, 0
for name in names:
    for n in range(20):
        decoded += scenes[name].depth(n).nbytes + scenes[name].image(n).nbytes
        assert DECODED.held_bytes <= limit
    most = max(most, private() - before)
print(decoded, most)
"""


@pytest.mark.parametrize("limit", [DEFAULT_BYTES, 32 << 20])
def test_a_process_that_reads_a_whole_library_holds_no_more_than_is_stated(tmp_path: Path, limit: int) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to see the memory of a process")
    words = [sys.executable, "-c", READER, str(tmp_path / "library"), str(limit)]
    run = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    decoded, most = map(int, run.stdout.split())
    assert decoded > 1.4e9
    assert most < limit + OPEN_BYTES + 16e6  # and the frames in hand

"""Damaged scene folders give a scene, or one line that names the file: no traceback, no crash, no hang."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support import damaged_scenes
from support.box_world import CAMERA, BoxWorld
from support.scene_formats import FORMAT_NAMES, write_colmap, write_scene_as

from gasp_fast.data.scenes.formats.pose_files import pack_poses
from gasp_fast.data.scenes.open import open_scene

TRIES = 100  # of each format


@pytest.mark.parametrize("name", [*FORMAT_NAMES, "rgbd with packed poses"])
def test_damaged_files_never_crash_or_hang_and_errors_name_the_file(tmp_path, capsys, name):
    small = BoxWorld(frames=3, camera=CAMERA / 8 + np.diag([0, 0, 7 / 8]), size=(45, 27))
    root = tmp_path / name
    root.mkdir()
    source = open_scene(small.write_rgbd(tmp_path / "small"))
    if name == "colmap":
        points = dict.fromkeys(source.frame_names, np.random.default_rng(0).uniform(1.0, 2.0, (20, 3)))
        write_colmap(source, root, points)
    else:
        write_scene_as(name.partition(" ")[0], source, root)
    if name not in FORMAT_NAMES:
        pack_poses(root)
        shutil.rmtree(root / "pose")
    done = subprocess.run(
        [sys.executable, damaged_scenes.__file__, str(root), str(tmp_path / "work"), str(TRIES)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, f"{done.stdout[-200:]}\n{done.stderr[-2000:]}"
    # OpenEXR's C++ part also prints its errors.
    printed = [line for line in done.stderr.splitlines() if "(EXR_ERR" not in line]
    assert not printed, printed[:20]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f" {name}: {TRIES} tries, {len(outcomes['failures'])} failures, {outcomes['refused']} refused")
    assert not outcomes["failures"], "\n".join(outcomes["failures"])
    assert outcomes["fine"] + outcomes["refused"] == TRIES and outcomes["refused"] > 0.2 * TRIES

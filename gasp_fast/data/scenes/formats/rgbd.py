"""`rgbd`: `color/KEY.jpg`, `depth/KEY.png`, `pose/KEY.txt` (4x4 camera-to-world), `intrinsics.txt`, `meta.json`.

The layout of most RGB-D recorders. OpenCV axes; one camera for all frames, for the size of the colour images; depth in
16 bits, in units of 1 / `depth_scale` of `meta.json` (by default 1000: millimetres; see `meta.py`). Poses may be packed
into one `poses.txt` (see `pose_files.py`).
"""

from __future__ import annotations

from pathlib import Path

from gasp_fast.data.scenes.folder import SceneFolder
from gasp_fast.data.scenes.scene import Scene

from .color_depth_pose import Layout, read_color_depth_pose
from .meta import META, depth_invalid, depth_scale, read_meta
from .pose_files import FOLDER, POSES, read_matrix

NAME = "rgbd"
FILES = "color/, pose/ (or poses.txt) and intrinsics.txt"


def detect(root: Path) -> bool:
    return (
        (root / "color").is_dir()
        and ((root / FOLDER).is_dir() or (root / POSES).is_file())
        and (root / "intrinsics.txt").is_file()
    )


def read(root: Path) -> Scene:
    files = SceneFolder(root)
    meta = read_meta(files)
    intrinsics = read_matrix(files.inside(root / "intrinsics.txt"))[:3, :3]
    layout = Layout(NAME, intrinsics, 1.0 / depth_scale(root, meta, 1000.0), depth_invalid(root / META, meta))
    return read_color_depth_pose(files, layout)

"""`scannet`: what ScanNet's `SensReader` exports from a `.sens` file.

    color/0.jpg ...  depth/0.png ...  pose/0.txt ...  intrinsic/intrinsic_color.txt  intrinsic/intrinsic_depth.txt

Poses are camera-to-world in OpenCV axes, and -inf where tracking was lost: such frames are skipped. Depth is in
millimetres, of another size and other intrinsics than the photographs; it is resampled to their camera. The matrices
count pixel centres from 0, ours from 0.5. Poses may be packed into one `poses.txt` (see `pose_files.py`).
"""

from __future__ import annotations

from pathlib import Path

from gasp_fast.data.scenes.depth_maps import PinholeCamera
from gasp_fast.data.scenes.folder import SceneFolder
from gasp_fast.data.scenes.scene import Scene, intrinsics_fault

from .color_depth_pose import Layout, read_color_depth_pose
from .meta import META, depth_invalid, depth_scale, read_meta
from .pose_files import read_matrix

NAME = "scannet"
FILES = "intrinsic/intrinsic_color.txt and intrinsic_depth.txt"
COLOR = "intrinsic/intrinsic_color.txt"
DEPTH = "intrinsic/intrinsic_depth.txt"


def detect(root: Path) -> bool:
    return (root / COLOR).is_file()


def read(root: Path) -> Scene:
    files = SceneFolder(root)
    meta = read_meta(files)
    if not files.is_file(files.inside(root / DEPTH)):
        raise OSError(f"{root / DEPTH}: missing, or not a regular file")
    colour, depth = (read_matrix(files.inside(root / name))[:3, :3] for name in (COLOR, DEPTH))
    if fault := intrinsics_fault(depth):
        raise ValueError(f"{root / DEPTH}: {fault}")
    for matrix in (colour, depth):
        matrix[:2, 2] += 0.5
    camera = PinholeCamera(depth[0, 0], depth[1, 1], depth[0, 2], depth[1, 2])
    unknown = depth_invalid(root / META, meta)
    layout = Layout(NAME, colour, 1.0 / depth_scale(root, meta, 1000.0), unknown, camera)
    return read_color_depth_pose(files, layout)

"""Writes scene folders as they are downloaded, without any code of gasp_fast."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_dl3dv_download(root: Path, world, image_folder: str = "images_4", json_folder: str = ".", **extra) -> Path:
    """The layout of DL3DV: intrinsics for four times the stored size, camera-to-world in Blender axes."""
    flip = np.diag([1.0, -1.0, -1.0, 1.0])
    (root / image_folder).mkdir(parents=True)
    (root / json_folder).mkdir(parents=True, exist_ok=True)
    entries = []
    for f in range(world.frames):
        Image.fromarray(world.image(f)).save(root / image_folder / f"frame_{f:05d}.png")
        matrix = np.linalg.inv(world.pose(f)) @ flip
        entries.append({"file_path": f"images/frame_{f:05d}.png", "transform_matrix": matrix.tolist()})
    focal = {"fl_x": 4 * world.camera[0, 0], "fl_y": 4 * world.camera[1, 1]}
    centre = {"cx": 4 * world.camera[0, 2], "cy": 4 * world.camera[1, 2]}
    size = {"w": 4 * world.size[0], "h": 4 * world.size[1]}
    meta = {"camera_model": "OPENCV", **focal, **centre, **size, "frames": entries, **extra}
    (root / json_folder / "transforms.json").write_text(json.dumps(meta))
    return root

"""Writes a scene in the layouts of published data sets, for tests that read it back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from gasp_fast.data.scenes.formats.colmap_model import ModelImage
from gasp_fast.data.scenes.lens import NO_DISTORTION
from gasp_fast.data.scenes.scene import Scene, rigid_inverse

TO_ZERO = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0.0]])  # these data sets count pixel centres from 0


def write_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_units(path: Path, depth: np.ndarray, units_per_metre: float) -> None:
    write_picture(path, np.rint(depth * units_per_metre).astype(np.uint16))


def quaternion(rotation: np.ndarray) -> np.ndarray:  # x, y, z, w
    """Of a rotation by less than half a turn."""
    w = np.sqrt(1 + np.trace(rotation)) / 2
    skew = rotation - rotation.T
    return np.array([skew[2, 1] / (4 * w), skew[0, 2] / (4 * w), skew[1, 0] / (4 * w), w])


def write_scannet(scene: Scene, root: Path) -> None:
    for i, name in enumerate(scene.frame_names):
        write_picture(root / "color" / f"{name}.png", scene.image(i))
        write_units(root / "depth" / f"{name}.png", scene.depth(i), 1000)
        (root / "pose").mkdir(exist_ok=True)
        np.savetxt(root / "pose" / f"{name}.txt", rigid_inverse(scene.pose(i)), fmt="%.17g")
    matrix = np.eye(4)
    matrix[:3, :3] = scene.intrinsics(0) - TO_ZERO
    (root / "intrinsic").mkdir()
    for kind in ("color", "depth"):
        np.savetxt(root / "intrinsic" / f"intrinsic_{kind}.txt", matrix, fmt="%.17g")


def write_replica(scene: Scene, root: Path) -> None:
    for i, name in enumerate(scene.frame_names):
        write_picture(root / "results" / f"frame{name}.png", scene.image(i))
        write_units(root / "results" / f"depth{name}.png", scene.depth(i), 1000)
    poses = [rigid_inverse(scene.pose(i)).ravel() for i in range(len(scene))]
    np.savetxt(root / "traj.txt", poses, fmt="%.17g")
    matrix = scene.intrinsics(0) - TO_ZERO
    focal = {"fx": matrix[0, 0], "fy": matrix[1, 1], "cx": matrix[0, 2], "cy": matrix[1, 2]}
    (root / "cam_params.json").write_text(json.dumps({"camera": {**focal, "scale": 1000.0}}))


def write_tum(scene: Scene, root: Path, units_per_metre: float = 1000.0) -> None:
    """Photographs at 30 Hz; depth maps a little later, and poses at 90 Hz."""
    lists: dict[str, list[str]] = {"rgb": ["# color images"], "depth": ["# depth maps"], "groundtruth": ["# poses"]}
    for i, name in enumerate(scene.frame_names):
        write_picture(root / "rgb" / f"{name}.png", scene.image(i))
        write_units(root / "depth" / f"{name}.png", scene.depth(i), units_per_metre)
        pose = rigid_inverse(scene.pose(i))
        values = " ".join(f"{value:.17g}" for value in (*pose[:3, 3], *quaternion(pose[:3, :3])))
        time = 1_305_031_102.0 + i / 30
        lists["rgb"].append(f"{time:.6f} rgb/{name}.png")
        lists["depth"].append(f"{time + 0.006:.6f} depth/{name}.png")
        lists["groundtruth"].append(f"{time + 0.001:.6f} {values}")
        lists["groundtruth"] += [f"{time + after:.6f} 0 0 0 0 0 0 1" for after in (1 / 90, 2 / 90)]
    for kind, lines in lists.items():
        (root / f"{kind}.txt").write_text("\n".join(lines) + "\n")
    np.savetxt(root / "intrinsics.txt", scene.intrinsics(0) - TO_ZERO, fmt="%.17g")
    if units_per_metre != 5000.0:
        (root / "meta.json").write_text(json.dumps({"depth_scale": units_per_metre}))


def write_scannetpp(scene: Scene, root: Path) -> None:
    from support.scene_formats import write_model

    images = []
    for i, name in enumerate(scene.frame_names):
        write_picture(root / "iphone" / "rgb" / f"{name}.png", scene.image(i))
        write_units(root / "iphone" / "depth" / f"{name}.png", scene.depth(i), 1000)
        camera = (scene.image_size(i), scene.intrinsics(i), NO_DISTORTION)
        images.append(ModelImage(f"{name}.png", *camera, scene.pose(i)))
    write_model(root / "iphone" / "colmap", images)

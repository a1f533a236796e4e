"""Reads the folders `color/`, `depth/` and `pose/`, whose files share the keys of the frames as their names."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gasp_fast.data.scenes.depth_maps import DepthFile, PinholeCamera
from gasp_fast.data.scenes.folder import SceneFolder
from gasp_fast.data.scenes.scene import (
    IMAGE_SUFFIXES,
    Frame,
    Scene,
    Skipped,
    build_scene,
    check_frame_count,
    image_size,
    world_to_camera,
)

from .pose_files import PoseFiles, with_suffix

DEPTH_SUFFIXES = (".png", ".npy", ".exr")


@dataclass(frozen=True)
class Layout:
    """What the files themselves do not say."""

    format: str
    intrinsics: np.ndarray  # float64 [3, 3], for the size of the photographs
    depth_unit: float  # of a PNG; the float formats hold the scene's own unit
    unknown: tuple[float, ...] = ()  # stored values of depth that mean unknown
    depth_camera: PinholeCamera | None = None  # if it is not the one of the photographs


def read_color_depth_pose(files: SceneFolder, layout: Layout) -> Scene:
    root = files.root
    images = with_suffix(files, root / "color", IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"{root / 'color'}: no image")
    check_frame_count(root / "color", len(images))
    depths = {path.stem: path for path in with_suffix(files, root / "depth", DEPTH_SUFFIXES)}
    camera_size = image_size(files.inside(images[0]))
    poses = PoseFiles(files)
    frames: list[Frame] = []
    skipped: list[Skipped] = []
    for image in images:
        camera_to_world = poses.find(image.stem)
        if isinstance(camera_to_world, str):
            skipped.append(Skipped(image.stem, camera_to_world))
            continue
        depth_file = None
        if depth := depths.get(image.stem):
            unit = layout.depth_unit if depth.suffix.lower() == ".png" else 1.0
            depth_file = DepthFile(depth, unit, unknown=layout.unknown, camera=layout.depth_camera)
        pose = world_to_camera(camera_to_world)
        frames.append(Frame(image.stem, image, layout.intrinsics, pose, camera_size, depth_file))
    orphans = set(depths) - {image.stem for image in images}
    skipped += [Skipped(name, "depth without an image") for name in sorted(orphans)]
    return build_scene(root, layout.format, frames, skipped, files=files)

"""Writes a scene in each of the known folder formats, for tests that read it back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from support.dataset_formats import write_replica, write_scannet, write_scannetpp, write_tum

from gasp_fast.data.scenes.formats import FORMATS, colmap, dl3dv, replica, rgbd, scannet, scannetpp, tum, vggt
from gasp_fast.data.scenes.formats.colmap_model import ModelImage
from gasp_fast.data.scenes.lens import NO_DISTORTION
from gasp_fast.data.scenes.scene import Scene, rigid_inverse

FORMAT_NAMES = [module.NAME for module in FORMATS]
LENS = (0.08, -0.03, 0.004, -0.002)  # k1, k2, p1, p2


def mistaken(scene: Scene, pose: Callable[[np.ndarray], np.ndarray] = lambda p: p, scale: float = 1.0) -> Scene:
    """The scene as it would be read with a wrong convention of its poses or its depth scale."""
    return replace(
        scene,
        frames=tuple(
            replace(frame, pose=pose(frame.pose), depth=replace(frame.depth, scale=frame.depth.scale * scale))
            for frame in scene.frames
        ),
    )


def write_scene_as(name: str, scene: Scene, root: Path) -> None:
    """Writes `scene` into the folder `root` in the format `name`."""
    WRITERS[name](scene, root)


def write_depth(path: Path, depth: np.ndarray, scale: float = 1.0) -> None:
    """Writes `depth / scale` in the format of the suffix. A `.png` rounds to whole units."""
    stored = depth if scale == 1.0 else depth / np.float32(scale)
    suffix = path.suffix.lower()
    if suffix == ".npy":
        np.save(path, stored)
    elif suffix == ".png":
        units = np.rint(stored)
        assert units.max(initial=0) <= np.iinfo(np.uint16).max
        Image.fromarray(units.astype(np.uint16)).save(path)
    elif suffix == ".exr":
        import OpenEXR

        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        OpenEXR.File(header, {"Z": np.ascontiguousarray(stored)}).write(str(path))
    else:
        assert suffix == ".bin"
        height, width = stored.shape
        path.write_bytes(f"{width}&{height}&1&".encode() + stored.astype("<f4").tobytes())


def _folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)


def _write_images(scene: Scene, folder: Path) -> None:
    for i, name in enumerate(scene.frame_names):
        Image.fromarray(scene.image(i)).save(folder / f"{name}.png")


def write_rgbd(scene: Scene, root: Path, units_per_metre: float = 1000.0) -> None:
    """Rounds depth to 16-bit units. All frames must share one camera."""
    _folders(root, "color", "depth", "pose")
    _write_images(scene, root / "color")
    for i, name in enumerate(scene.frame_names):
        assert np.array_equal(scene.intrinsics(i), scene.intrinsics(0))
        np.savetxt(root / "pose" / f"{name}.txt", rigid_inverse(scene.pose(i)), fmt="%.17g")
        if scene.has_depth:
            write_depth(root / "depth" / f"{name}.png", scene.depth(i), 1.0 / units_per_metre)
    np.savetxt(root / "intrinsics.txt", scene.intrinsics(0), fmt="%.17g")
    (root / "meta.json").write_text(json.dumps({"depth_scale": units_per_metre}))


def write_vggt(scene: Scene, root: Path) -> None:
    _folders(root, "images", "depths")
    _write_images(scene, root / "images")
    for i, name in enumerate(scene.frame_names):
        if scene.frames[i].depth is not None:
            write_depth(root / "depths" / f"{name}.exr", scene.depth(i))
    (root / "image_names.json").write_text(json.dumps([f"{name}.png" for name in scene.frame_names]))
    np.save(root / "cam_from_worlds.npy", np.stack([scene.pose(i)[:3] for i in range(len(scene))]))
    np.save(root / "intrinsics.npy", np.stack([scene.intrinsics(i) for i in range(len(scene))]))


def write_dl3dv(scene: Scene, root: Path) -> None:
    """Writes undistorted photographs, and depth as float32 `.npy` files."""
    _folders(root, "images_4", "depths")
    _write_images(scene, root / "images_4")
    entries = []
    for i, name in enumerate(scene.frame_names):
        matrix = scene.intrinsics(i)
        width, height = scene.image_size(i)
        entry: dict[str, Any] = {
            "file_path": f"images/{name}.png",
            "transform_matrix": (rigid_inverse(scene.pose(i)) @ np.diag([1.0, -1.0, -1.0, 1.0])).tolist(),
            **{"fl_x": matrix[0, 0], "fl_y": matrix[1, 1], "cx": matrix[0, 2], "cy": matrix[1, 2]},
            **{"w": width, "h": height},
        }
        if scene.frames[i].depth is not None:
            entry["depth_file_path"] = f"depths/{name}.npy"
            write_depth(root / entry["depth_file_path"], scene.depth(i))
        entries.append(entry)
    (root / "transforms.json").write_text(json.dumps({"camera_model": "PINHOLE", "frames": entries}, indent=1))


def write_colmap(scene: Scene, root: Path, points: dict[str, np.ndarray] | None = None) -> None:
    """Writes a dense workspace; `points` maps a frame's name to the world positions [n, 3] that it observes."""
    _folders(root, "images", "stereo/depth_maps")
    _write_images(scene, root / "images")
    images = []
    for i, key in enumerate(scene.frame_names):
        if scene.frames[i].depth is not None:
            write_depth(root / "stereo" / "depth_maps" / f"{key}.png.geometric.bin", scene.depth(i))
        camera = (scene.image_size(i), scene.intrinsics(i), NO_DISTORTION)
        images.append(ModelImage(f"{key}.png", *camera, scene.pose(i), (points or {}).get(key)))
    write_model(root / "sparse", images)


def write_model(folder: Path, images: list[ModelImage]) -> None:
    """Writes undistorted `images` as a binary COLMAP model; the world positions in `points` become its 3D points."""
    import pycolmap

    model = pycolmap.Reconstruction()
    for k, image in enumerate(images, start=1):
        matrix = image.intrinsics
        params = [matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]]
        width, height = image.size
        model.add_camera_with_trivial_rig(
            pycolmap.Camera(model="PINHOLE", width=width, height=height, params=params, camera_id=k)
        )
        entry = pycolmap.Image(name=image.name, camera_id=k, image_id=k)
        points = np.zeros((0, 3)) if image.points is None else image.points
        in_camera = points @ image.pose[:3, :3].T + image.pose[:3, 3]
        pixels = (in_camera @ matrix.T)[:, :2] / in_camera[:, 2:]
        entry.points2D = pycolmap.Point2DList([pycolmap.Point2D(pixel) for pixel in pixels])
        model.add_image_with_trivial_frame(entry, pycolmap.Rigid3d(image.pose[:3]))
        for i, point in enumerate(points):
            track = pycolmap.Track()
            track.add_element(k, i)
            model.add_point3D(point, track, np.zeros(3, np.uint8))
    folder.mkdir(parents=True, exist_ok=True)
    model.write_binary(str(folder))


WRITERS: dict[str, Callable[[Scene, Path], None]] = {
    rgbd.NAME: write_rgbd,
    vggt.NAME: write_vggt,
    dl3dv.NAME: write_dl3dv,
    colmap.NAME: write_colmap,
    scannet.NAME: write_scannet,
    scannetpp.NAME: write_scannetpp,
    replica.NAME: write_replica,
    tum.NAME: write_tum,
}

"""`scannetpp`: the iPhone recording of a ScanNet++ scene, with photographs and depth extracted by its toolkit.

    iphone/rgb/frame_000000.jpg ...  iphone/depth/frame_000000.png ...  iphone/colmap/{cameras,images,points3D}.txt

The COLMAP model is metric and registers some of the frames; the others are not read. Depth is in millimetres, coarser
than the photographs, and shows the same through the same lens.
"""

from __future__ import annotations

from pathlib import Path

from gasp_fast.data.scenes.depth_maps import DepthFile
from gasp_fast.data.scenes.folder import SceneFolder
from gasp_fast.data.scenes.scene import Frame, Scene, Skipped, build_scene, check_frame_count

from .colmap_model import check_model_files, has_model, read_model
from .meta import META, depth_invalid, depth_scale, read_meta

NAME = "scannetpp"
FILES = "iphone/rgb/ and a model in iphone/colmap/"
IMAGES, DEPTHS, MODEL = Path("iphone/rgb"), Path("iphone/depth"), Path("iphone/colmap")


def detect(root: Path) -> bool:
    return (root / IMAGES).is_dir() and has_model(SceneFolder(root), root / MODEL)


def read(root: Path) -> Scene:
    files = SceneFolder(root)
    meta = read_meta(files)
    unit, unknown = 1.0 / depth_scale(root, meta, 1000.0), depth_invalid(root / META, meta)
    check_model_files(files, root / MODEL)
    images = read_model(root / MODEL)
    check_frame_count(root / MODEL, len(images))
    frames: list[Frame] = []
    skipped: list[Skipped] = []
    for image in images:
        key = Path(image.name).stem
        path = files.inside(root / IMAGES / image.name)
        if not files.is_file(path):
            skipped.append(Skipped(key, f"{path} is missing"))
            continue
        depth = files.inside(root / DEPTHS / f"{key}.png")
        depth_file = DepthFile(depth, unit, distorted=True, unknown=unknown) if files.is_file(depth) else None
        frames.append(Frame(key, path, image.intrinsics, image.pose, image.size, depth_file, image.distortion))
    return build_scene(root, NAME, frames, skipped, root / MODEL, files)

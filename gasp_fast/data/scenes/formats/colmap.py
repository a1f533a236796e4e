"""`colmap`: a sparse model, its photographs, and the depth maps of COLMAP's multi-view stereo if it has run.

Two layouts: a project (`sparse/0`, `images/`) and the dense workspace that `colmap image_undistorter` makes (`sparse`,
`images/`, `stereo/depth_maps/NAME.geometric.bin`). A workspace inside a project (`dense/`, `dense/0/`, …) is
preferred if it has stereo maps: they belong to its own undistorted photographs.
"""

from __future__ import annotations

from pathlib import Path

from gasp_fast.data.scenes.depth_maps import DepthFile
from gasp_fast.data.scenes.folder import SceneFolder
from gasp_fast.data.scenes.scene import Frame, Scene, Skipped, build_scene, check_frame_count

from .colmap_model import check_model_files, has_model, read_model

NAME = "colmap"
FILES = "a model (cameras, images, points3D as .bin or .txt) in sparse/ or sparse/0/"
WORKSPACES = (".", "dense/0", "dense", "colmap", "colmap/dense/0", "colmap/dense", "colmap/colmap")
MODELS = ("sparse", "sparse/0")
IMAGE_FOLDERS = ("images", "images_4", "images_8", "images_2")
DEPTH_FOLDER = "stereo/depth_maps"


def detect(root: Path) -> bool:
    return find_model(root) is not None


def find_model(root: Path, files: SceneFolder | None = None) -> tuple[Path, Path] | None:
    """(workspace, model folder) below `root`; a workspace with stereo depth comes first."""
    files = files or SceneFolder(root)
    models = [
        (root / workspace, root / workspace / model)
        for workspace in WORKSPACES
        for model in MODELS
        if has_model(files, root / workspace / model)
    ]
    with_depth = [pair for pair in models if files.is_dir(pair[0] / DEPTH_FOLDER)]
    return next(iter(with_depth + models), None)


def read(root: Path) -> Scene:
    files = SceneFolder(root)
    located = find_model(root, files)
    if located is None:
        raise ValueError(f"{root}: no COLMAP model; looked for {FILES}")
    workspace, model = located
    check_model_files(files, model)
    images = read_model(model)
    check_frame_count(model, len(images))
    folder = _image_folder(files, workspace)
    stems = [_without_suffix(image.name) for image in images]
    keys = stems if len(set(stems)) == len(stems) else [image.name for image in images]
    frames: list[Frame] = []
    skipped: list[Skipped] = []
    for key, image in zip(keys, images, strict=True):
        path = files.inside(folder / image.name)
        if not files.is_file(path):
            skipped.append(Skipped(key, f"{path} is missing"))
            continue
        depth = files.inside(workspace / DEPTH_FOLDER / f"{image.name}.geometric.bin")
        depth_file = DepthFile(depth) if files.is_file(depth) else None
        frames.append(Frame(key, path, image.intrinsics, image.pose, image.size, depth_file, image.distortion))
    return build_scene(root, NAME, frames, skipped, model, files)


def _image_folder(files: SceneFolder, workspace: Path) -> Path:
    for base in (workspace, files.root):
        for name in IMAGE_FOLDERS:
            if files.is_dir(base / name):
                return base / name
    raise ValueError(f"{files.root}: a COLMAP model but no photographs; looked for {', '.join(IMAGE_FOLDERS)}")


def _without_suffix(name: str) -> str:
    return str(Path(name).with_suffix("")) if Path(name).name else name

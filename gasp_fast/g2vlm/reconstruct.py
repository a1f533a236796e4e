"""Photographs from files, and the files of their geometry: points, depth, cameras and a page.

Nothing that a model predicts has a unit, so all lengths are relative to each other.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from gasp_fast.data.errors import reading
from gasp_fast.data.images import open_image
from gasp_fast.drawing import save_figure
from gasp_fast.evaluation.page import cloud_part, links, picture, write_page
from gasp_fast.files import complete_folder, write_atomically

from .cloud import cloud_of, preview_data, write_ply
from .data_config import MOST_FRAMES
from .inference import Reconstruction
from .pictures import COLUMNS, draw_predicted_depths

CLOUD, CAMERAS, PAGE = "cloud.ply", "cameras.json", "index.html"
AXES = "x right, y down, z ahead; a camera's rotation and translation map its points to the camera of image 0; no unit"


def check_new(out: Path) -> None:
    """Raise if `out` holds anything."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"out = {str(out)!r} is not empty; name a new folder, or empty it")


def read_photographs(paths: Sequence[Path]) -> list[Image.Image]:
    """Upright, as their EXIF orientation says."""
    if not 1 <= len(paths) <= MOST_FRAMES:
        raise ValueError(f"{len(paths)} images are given; give 1 to {MOST_FRAMES}")
    photographs = []
    for path in paths:
        with reading(path, "the image"), open_image(path) as image:
            photographs.append(ImageOps.exif_transpose(image).convert("RGB"))
    return photographs


def write_reconstruction(found: Reconstruction, paths: Sequence[Path], model: str, out: Path) -> Path:
    """Writes all files; returns the page. `out` holds all of them, or nothing."""
    check_new(out)
    cloud = cloud_of(found.world, found.images, np.ones(found.depth.shape, bool))
    with complete_folder(out) as folder:
        write_ply(folder / CLOUD, cloud)
        write_atomically(folder / CAMERAS, (json.dumps(cameras_of(found, paths), indent=1) + "\n").encode())
        depths = _draw_depths(found, folder)
        what = f"{len(paths)} photograph{'s' if len(paths) > 1 else ''}, {len(cloud):,} points. Lengths have no unit."
        parts = [
            f"<p>{html.escape(what)}</p>",
            links([("points: cloud.ply", folder / CLOUD), ("cameras: cameras.json", folder / CAMERAS)], folder),
            cloud_part(
                "Predicted points and cameras, as image 0 sees them.",
                preview_data(cloud, found.rotation, found.translation),
            ),
            "<h2>Depth</h2>",
            *(picture(caption, path) for caption, path in depths),
        ]
        write_page(folder / PAGE, f"Reconstruction by {model}", parts)
    return out / PAGE


def cameras_of(found: Reconstruction, paths: Sequence[Path]) -> dict[str, Any]:
    """The content of cameras.json."""
    height, width = found.depth.shape[1:]
    poses = zip(paths, found.rotation.tolist(), found.translation.tolist(), found.crops, strict=True)
    return {
        "axes": AXES,
        "height": height,  # of the crops of the photographs from which the geometry is predicted
        "width": width,
        "images": [
            {"image": str(path), "rotation": rotation, "translation": translation, "crop": asdict(crop)}
            for path, rotation, translation, crop in poses
        ],
    }


def _draw_depths(found: Reconstruction, folder: Path) -> list[tuple[str, Path]]:
    """Some photographs a figure, all in the same colours: captions and files."""
    figures = []
    for start in range(0, len(found.images), COLUMNS):
        images = found.images[start : start + COLUMNS]
        figure = draw_predicted_depths(images, found.depth[start : start + COLUMNS], found.depth, start)
        path = save_figure(figure, folder / f"depth-{start:03d}.png")
        last = start + len(images) - 1
        figures.append((f"Image{f's {start} to' * (last > start)} {last} above its depth", path))
    return figures

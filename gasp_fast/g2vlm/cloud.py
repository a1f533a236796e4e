"""Coloured point clouds: as a PLY file for other programs, and as data of a preview that turns in a page."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gasp_fast.files import replacing

MOST_IN_FILE = 1_000_000  # points
MOST_IN_PAGE = 120_000  # points, of 12 characters: 1.4 MB
FRUSTUM = 0.08  # depth of a drawn camera; the cloud reaches from -1 to 1
VERTEX = np.dtype(
    [(name, "<f4") for name in ("x", "y", "z")] + [(name, "u1") for name in ("red", "green", "blue")]
)  # of a PLY file


@dataclass(frozen=True)
class Cloud:
    points: NDArray[np.float32]  # [n, 3]
    colours: NDArray[np.uint8]  # [n, 3]

    def __len__(self) -> int:
        return len(self.points)

    def thinned(self, most: int) -> Cloud:
        """At most `most` points, spread evenly over the frames and their rows."""
        if len(self) <= most:
            return self
        chosen = np.arange(most) * len(self) // most
        return Cloud(self.points[chosen], self.colours[chosen])


def cloud_of(
    points: ArrayLike,  # [F, H, W, 3]
    images: ArrayLike,  # uint8 [F, H, W, 3]
    valid: ArrayLike,  # bool [F, H, W]
    most: int = MOST_IN_FILE,
) -> Cloud:
    """The valid points that are finite, at most `most` of them."""
    positions, colours = np.asarray(points, np.float32), np.asarray(images)
    if positions.shape != colours.shape or colours.dtype != np.uint8:
        raise ValueError(
            f"points are {positions.shape} and images {colours.dtype} {colours.shape}; both must be [F, H, W, 3], "
            "images as uint8"
        )
    chosen = np.asarray(valid, bool) & np.isfinite(positions).all(-1)
    return Cloud(positions[chosen], colours[chosen]).thinned(most)


def write_ply(path: Path, cloud: Cloud) -> Path:
    """A binary PLY file."""
    vertices = np.empty(len(cloud), VERTEX)
    for number, name in enumerate("xyz"):
        vertices[name] = cloud.points[:, number]
    for number, name in enumerate(("red", "green", "blue")):
        vertices[name] = cloud.colours[:, number]
    kinds = {"<f4": "float", "|u1": "uchar"}
    properties = [f"property {kinds[VERTEX[name].str]} {name}" for name in VERTEX.names or ()]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(cloud)}", *properties, "end_header", ""]
    with replacing(path) as partial, open(partial, "wb") as file:
        file.write("\n".join(header).encode())
        vertices.tofile(file)
    return path


def preview_data(
    cloud: Cloud,
    rotation: ArrayLike | None = None,  # [F, 3, 3], poses of cameras that are drawn, in the frame of the points
    translation: ArrayLike | None = None,  # [F, 3]
    most: int = MOST_IN_PAGE,
) -> dict[str, Any]:
    """What `evaluation.page.cloud_part` shows, without points far outside the others.

    The page shows a cube. Its side is 1.25 times the longest range of an axis without 5 % of the points at either end.
    Positions are rounded to 1 / 65536 of it.
    """
    if not len(cloud):
        raise ValueError("the cloud has no points; nothing can be shown")
    low, high = np.percentile(cloud.points, [5, 95], axis=0)
    middle, half = (low + high) / 2, max(1.25 * float((high - low).max()) / 2, 1e-12)
    scaled = (cloud.points - middle) / half
    inside = (np.abs(scaled) <= 1).all(-1)
    shown = Cloud(scaled[inside].astype(np.float32), cloud.colours[inside]).thinned(most)
    steps = np.rint((shown.points + 1) * 32767.5).astype("<u2")
    lines = np.zeros((0, 2, 3))
    if rotation is not None and translation is not None:
        turns, places = np.asarray(rotation, np.float64), np.asarray(translation, np.float64)
        lines = np.concatenate([_frustum(*pose) for pose in zip(turns, (places - middle) / half, strict=True)])
    return {
        "points": base64.b64encode(steps.tobytes()).decode(),
        "colours": base64.b64encode(shown.colours.tobytes()).decode(),
        "lines": lines.round(4).tolist(),
    }


def _frustum(rotation: NDArray[Any], place: NDArray[Any]) -> NDArray[Any]:
    """Edges of a pyramid whose tip is the camera: [8, 2, 3]."""
    corners = FRUSTUM * np.array([[-0.6, -0.45, 1], [0.6, -0.45, 1], [0.6, 0.45, 1], [-0.6, 0.45, 1]])
    corners = corners @ rotation.T + place
    tips = np.broadcast_to(place, corners.shape)
    return np.concatenate([np.stack([tips, corners], 1), np.stack([corners, np.roll(corners, -1, 0)], 1)])

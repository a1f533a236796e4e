"""A small world whose geometry is known in closed form, and its folder on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 360, 216  # cells of a 24 x 24 grid have their centres on pixel centres
CAMERA = np.array([[300.0, 0.0, 181.5], [0.0, 310.0, 107.25], [0.0, 0.0, 1.0]])


@dataclass
class BoxWorld:
    """A room with two boxes, seen by a camera that moves sideways and turns. Metres, OpenCV axes."""

    frames: int = 8
    camera: np.ndarray = field(default_factory=CAMERA.copy)
    size: tuple[int, int] = (WIDTH, HEIGHT)
    room: tuple[np.ndarray, np.ndarray] = (np.array([-3.0, -1.6, -2.0]), np.array([3.0, 1.4, 5.0]))
    boxes: tuple[tuple[np.ndarray, np.ndarray], ...] = (
        (np.array([-0.9, -0.3, 2.2]), np.array([-0.2, 0.6, 2.9])),
        (np.array([0.4, -0.5, 3.1]), np.array([1.1, 0.7, 3.6])),
    )

    def pose(self, f: int) -> np.ndarray:  # world-to-camera
        yaw, pitch = 0.03 * f, -0.01 * f
        turn = np.array([[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]])
        nod = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
        pose = np.eye(4)
        pose[:3, :3] = nod @ turn
        pose[:3, 3] = -pose[:3, :3] @ np.array([0.08 * f, 0.02 * f, 0.05 * f])
        return pose

    def centre(self, f: int) -> np.ndarray:
        return np.linalg.inv(self.pose(f))[:3, 3]

    def distance(self, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Along `direction` [..., 3] (any length) to the first surface: slabs, from inside the room."""
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = ((wall - origin) / direction for wall in self.room)
            nearest = np.fmin.reduce(np.fmax(low, high), axis=-1)
            for corners in self.boxes:
                low, high = ((wall - origin) / direction for wall in corners)
                enter = np.fmax.reduce(np.fmin(low, high), axis=-1)
                leave = np.fmin.reduce(np.fmax(low, high), axis=-1)
                nearest = np.where((enter < leave) & (enter > 0), np.fmin(nearest, enter), nearest)
        return nearest

    def rays(self, f: int, pixel: np.ndarray) -> np.ndarray:  # [..., 3] in world axes, z = 1 in the camera
        x = (pixel[..., 0] - self.camera[0, 2]) / self.camera[0, 0]
        y = (pixel[..., 1] - self.camera[1, 2]) / self.camera[1, 1]
        return np.stack([x, y, np.ones_like(x)], axis=-1) @ self.pose(f)[:3, :3]

    def pixels(self) -> np.ndarray:  # [H, W, 2], centres
        return np.stack(np.meshgrid(np.arange(self.size[0]) + 0.5, np.arange(self.size[1]) + 0.5), axis=-1)

    def depth(self, f: int) -> np.ndarray:  # [H, W], z
        return self.distance(self.centre(f), self.rays(f, self.pixels()))

    def image(self, f: int) -> np.ndarray:
        rays = self.rays(f, self.pixels())
        point = self.centre(f) + rays * self.depth(f)[..., None]
        waves = 0.5 + 0.25 * np.sin(point * np.array([5.0, 6.0, 4.0])) + 0.25 * np.sin(point[..., [1, 2, 0]] * 11.0)
        return (255 * waves).astype(np.uint8)

    def project(self, f: int, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [n, 2] and depth [n] of world points [n, 3]."""
        local = point @ self.pose(f)[:3, :3].T + self.pose(f)[:3, 3]
        return (local @ self.camera.T)[:, :2] / local[:, 2:], local[:, 2]

    def visible(self, f: int, point: np.ndarray) -> np.ndarray:
        """Whether nothing lies between the camera and the points, and they are 4 px inside the image."""
        pixel, z = self.project(f, point)
        reached = self.distance(self.centre(f), point - self.centre(f))  # 1: the point itself
        inside = ((pixel >= 4) & (pixel <= np.array(self.size) - 4)).all(axis=1)
        return (z > 0) & inside & (reached > 1 - 1e-6)

    def write_rgbd(self, root: Path) -> Path:
        """The layout `rgbd`, written without the package."""
        for folder in ("color", "depth", "pose"):
            (root / folder).mkdir(parents=True)
        for f in range(self.frames):
            Image.fromarray(self.image(f)).save(root / "color" / f"{f:04d}.png")
            Image.fromarray(np.rint(self.depth(f) * 1000).astype(np.uint16)).save(root / "depth" / f"{f:04d}.png")
            np.savetxt(root / "pose" / f"{f:04d}.txt", np.linalg.inv(self.pose(f)))
        np.savetxt(root / "intrinsics.txt", self.camera)
        (root / "meta.json").write_text(json.dumps({"name": "boxes"}))
        return root

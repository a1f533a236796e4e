"""Places the boxes of a synthetic room and draws the path of the camera.

World axes: z up, metres, the room's floor at z = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

# Muted colours of nearly equal luminance: different to the eye, of little help to a matcher.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.26, 0.91, 0.88),
    "yellow": (1.10, 1.02, 0.72),
    "green": (0.86, 1.11, 0.86),
    "blue": (0.84, 1.00, 1.26),
    "purple": (1.08, 0.90, 1.22),
}


@dataclass(frozen=True)
class Box:
    """A box on the floor, turned about the vertical."""

    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    yaw: float
    colour: str
    texture: int

    @property
    def rotation(self) -> Float:
        """Box to world, `[3, 3]`."""
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


def place_boxes(rng: np.random.Generator, room: Float, azimuth: float, count: int) -> tuple[Box, ...]:
    """Two identical boxes, one near and one far as seen from the middle of the path; the others at random.

    Empty if the boxes do not fit; the caller then draws again.
    """
    middle = room.mean(axis=0)[:2]
    towards_camera = np.array([np.cos(azimuth), np.sin(azimuth)])
    sideways = np.array([-towards_camera[1], towards_camera[0]])
    colours = list(rng.permutation(list(COLOURS)))
    twin_half = rng.uniform([0.28, 0.28, 0.28], [0.42, 0.42, 0.55])
    side = rng.choice([-1, 1]) * rng.uniform(0.35, 0.8)
    spots = [(middle + towards_camera * rng.uniform(0.3, 0.8) + sideways * side, twin_half)]
    spots += [(middle - towards_camera * rng.uniform(1.0, 1.7) - sideways * side, twin_half)]
    for _ in range(200):
        if len(spots) == count:
            break
        radius, angle = 2.2 * np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
        half = rng.uniform([0.28, 0.28, 0.20], [0.55, 0.55, 0.80])
        spot = middle + radius * np.array([np.cos(angle), np.sin(angle)])
        if all(np.linalg.norm(spot - other) > np.hypot(*half[:2]) + np.hypot(*size[:2]) + 0.1 for other, size in spots):
            spots.append((spot, half))
    if len(spots) < count:
        return ()
    boxes = []
    for number, (spot, half) in enumerate(spots):
        kind = max(number - 1, 0)  # boxes 0 and 1 are the twins
        boxes.append(
            Box(
                centre=(float(spot[0]), float(spot[1]), float(half[2])),
                half=(float(half[0]), float(half[1]), float(half[2])),
                yaw=float(rng.uniform(0, np.pi)),
                colour=str(colours[kind % len(colours)]),
                texture=3 + kind,
            )
        )
    return tuple(boxes)


def camera_path(rng: np.random.Generator, room: Float, azimuth: float, frames: int) -> Float:
    """Camera-to-world poses `[F, 4, 4]`: an arc around the middle with varying height, distance, direction and roll.

    The periods are in units of 32 frames, whatever the number of frames: in a longer scene the camera goes there and
    back more often.
    """
    time = np.arange(frames) / 32

    def sway(amplitude: float, cycles: float) -> Float:
        return amplitude * np.sin(2 * np.pi * (cycles * rng.uniform(0.7, 1.3) * time + rng.uniform()))

    sweep = rng.choice([-1, 1]) * rng.uniform(0.55, 1.0)  # radians each way
    angle = azimuth + sweep * -np.cos(np.pi * time) + sway(0.06, 2)
    radius = rng.uniform(2.3, 3.0) + sway(0.45, 1)
    middle = room.mean(axis=0)
    eye = np.stack(
        [
            middle[0] + radius * np.cos(angle),
            middle[1] + radius * np.sin(angle),
            rng.uniform(1.2, 1.8) + sway(0.30, 1),
        ],
        axis=1,
    )
    target = np.stack([middle[0] + sway(0.7, 1), middle[1] + sway(0.7, 1), 0.55 + sway(0.35, 1)], axis=1)
    roll = sway(np.radians(14), 1) + sway(np.radians(4), 3)
    forward = target - eye
    forward /= np.linalg.norm(forward, axis=1, keepdims=True)
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    down = np.cross(forward, right)
    c, s = np.cos(roll)[:, None], np.sin(roll)[:, None]
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[:, :3, :] = np.stack([c * right + s * down, c * down - s * right, forward, eye], axis=2)
    return poses


def is_clear(eyes: Float, room: Float, boxes: Sequence[Box], margin: float = 0.35) -> bool:
    """Whether the camera positions keep `margin` metres from walls and boxes."""
    free = np.all((eyes > room[0] + margin) & (eyes < room[1] - margin))
    for box in boxes:
        local = np.abs((eyes - box.centre) @ box.rotation)
        free &= not np.any(np.all(local < np.array(box.half) + margin, axis=1))
    return bool(free)

"""Random depth maps and cameras for tests of tracks and pooling."""

from __future__ import annotations

import numpy as np

from gasp_fast.data.tracks.build import Views


def random_views(seed: int, frames: int = 5) -> Views:
    """Uneven surfaces with holes and noise, coarser maps, images of several sizes, a different pose for each frame."""
    draw = np.random.default_rng(seed)
    size = np.array([[draw.integers(30, 90), draw.integers(20, 70)] for _ in range(frames)])
    depth, intrinsics, pose = [], [], []
    for width, height in size:
        coarser = draw.choice([1, 1, 2, 3])
        shape = (max(2, height // coarser), max(2, width // coarser))
        ground = 2 + 0.3 * draw.standard_normal(shape).astype(np.float32) * draw.choice([0.1, 1.0])
        ground[draw.random(shape) < 0.2] = 0
        depth.append(np.maximum(ground, 0).astype(np.float32))
        intrinsics.append([[width * 0.8, 0, width / 2 + draw.normal()], [0, width * 0.9, height / 2], [0, 0, 1]])
        axis, angle = draw.standard_normal(3), draw.choice([0.05, 0.1, 2.0])
        x, y, z = axis / np.linalg.norm(axis)
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        matrix = np.eye(4)
        matrix[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
        matrix[:3, 3] = draw.normal(scale=0.1, size=3)
        pose.append(matrix)
    return Views(depth, np.array(intrinsics), np.array(pose), size, np.arange(frames))

"""Values in depth maps that stand for "unknown" although they look like a depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gasp_fast.data.scenes.depth_maps import marked_unknown, read_stored
from gasp_fast.data.scenes.scene import Scene

LEAST_SHARE = 0.005  # of the pixels of a map
APART = 2.0  # such a value is at least this many times as large as nearly all others
FEWEST_MAPS = 3
SAMPLE = 7  # every so many pixels


def marked_share(scene: Scene, frames: Sequence[int]) -> float:
    """The share of pixels with a value, other than 0, that the scene or the format declares to be unknown."""
    marked = pixels = 0
    for i in frames:
        file = scene.frames[i].depth
        if file is not None:
            stored = read_stored(file.path)
            marked += int((marked_unknown(stored, file.unknown) & (stored != 0)).sum())
            pixels += stored.size
    return marked / max(pixels, 1)


def undeclared_value(maps: Sequence[np.ndarray]) -> str:
    """Names a value that most maps have as their largest, at many pixels, far beyond all others; empty if none."""
    largest = max((float(one.max()) for one in maps), default=0.0)
    shares = [float((one == largest).mean()) for one in maps]
    if largest <= 0 or sum(share >= LEAST_SHARE for share in shares) < max(FEWEST_MAPS, len(maps) / 2):
        return ""
    sampled = np.concatenate([one.ravel()[::SAMPLE] for one in maps])
    others = sampled[(sampled > 0) & (sampled < largest)]
    if not others.size or largest < APART * np.percentile(others, 99):
        return ""
    return (
        f"{np.mean(shares):.0%} of the pixels have the depth {largest:g}, the largest of the scene and far beyond the "
        'others: it probably means unknown; then write "depth_invalid": VALUE, as stored in the maps, into meta.json '
        "(dl3dv: transforms.json)"
    )

"""Random frames with random tracks, and what the collator makes of them for a model."""

import numpy as np
import pytest

from gasp_fast.collator import Collator, Sample
from gasp_fast.data.tracks.build import Tracks

FRAMES, POINTS = 3, 60


@pytest.fixture(name="tracks")
def tracks_fixture(noise):
    """Random points in three frames of one size, with depth maps."""
    draw = np.random.default_rng(3)
    frames = noise(FRAMES, 160, 120)
    uv = draw.uniform(0, (160, 120), (POINTS, FRAMES, 2))
    depth = draw.uniform(1, 3, (POINTS, FRAMES))
    maps = [draw.uniform(1, 3, (60, 80)).astype(np.float32) for _ in range(FRAMES)]
    return frames, uv, draw.random((POINTS, FRAMES)) < 0.8, depth, maps


def batch_of(family, talk, tracks):
    """Inputs of the model, positions of the visual tokens, and their matches, from the package's own collator."""
    frames, uv, visible, depth, maps = tracks
    own = Tracks(np.arange(FRAMES), uv[:, 0], uv, visible, depth)
    batch = Collator(family.backbone)(
        [Sample(frames=frames, messages=talk(frames).messages, tracks=[own], depth=maps)],
    )
    return batch, batch.pop("visual_positions"), batch.pop("matches")

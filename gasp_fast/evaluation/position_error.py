"""δ_avg of TAP-Vid (Doersch et al., 2022): the share of points that are predicted within a few pixels. NumPy only.

Positions are in pixels of a frame that is stretched to 256 x 256, whatever its shape. The mean over the thresholds 1,
2, 4, 8 and 16 pixels of the share of points nearer than that, within a sequence, then over sequences.

A prediction is the centre of a token, the truth is where the point really is. A token of a 12 x 12 grid is 21 pixels
wide, so the centre of the right token is often more than 4 pixels away: the **ceiling** is δ_avg of predicting the true
token always. Compare with it, not with point trackers, which predict pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metrics import Metric

SIDE = 256  # pixels of the stretched frame
THRESHOLDS = (1, 2, 4, 8, 16)  # pixels


def pixel_distance(predicted: NDArray[Any], true: NDArray[Any]) -> NDArray[np.float64]:
    """Distance of positions `[..., 2]`, in shares of the frame's width and height, in pixels at 256 x 256."""
    return np.linalg.norm((predicted.astype(np.float64) - true) * SIDE, axis=-1)


def delta_avg(sequences: Sequence[NDArray[np.float64]]) -> list[Metric]:
    """From pixel distances `[L, M]` of each sequence, for each layer; None where a distance is NaN."""
    shares = np.mean([[(one < threshold).mean(1) for threshold in THRESHOLDS] for one in sequences], axis=(0, 1))  # [L]
    undefined = np.any([np.isnan(one).any(1) for one in sequences], axis=0)  # [L]
    return [None if nan else float(share) for share, nan in zip(shares, undefined, strict=True)]

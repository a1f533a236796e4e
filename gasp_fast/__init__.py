"""gasp_fast: geometric supervision for vision-language models.

The loss alone needs torch: `gasp_loss`, `GaspLoss`, `Matches`, `frame_match`. Whatever belongs to scenes, models or
training is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .frame_match import FrameMatch, frame_match
from .loss import GaspLoss, GaspOutput, LayerMetrics, gasp_loss
from .matches import Matches

if TYPE_CHECKING:
    from .data.scene import open_scene
    from .data.tracks import build_tracks
    from .heads import CorrespondenceHead

__version__ = "0.1.0"

_LAZY = {
    "CorrespondenceHead": ".heads",
    "build_tracks": ".data.tracks",
    "open_scene": ".data.scene",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "CorrespondenceHead",
    "FrameMatch",
    "GaspLoss",
    "GaspOutput",
    "LayerMetrics",
    "Matches",
    "build_tracks",
    "frame_match",
    "gasp_loss",
    "open_scene",
]

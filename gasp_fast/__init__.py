"""gasp_fast: geometric supervision for vision-language models.

The loss alone needs torch: `gasp_loss`, `GaspLoss`, `Matches`, `frame_match`. Every name is imported when it is first
asked for, so that `gasp-fast --help` and `gasp-fast doctor` need not even torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.scene import open_scene
    from .data.tracks import build_tracks
    from .frame_matching import FrameMatch, frame_match
    from .heads import CorrespondenceHead
    from .loss import GaspLoss, GaspOutput, LayerMetrics, gasp_loss
    from .matches import Matches

__version__ = "0.1.0"

_HOME = {  # no name of these is that of a module beside this one: importing that module would hide it
    "CorrespondenceHead": ".heads",
    "FrameMatch": ".frame_matching",
    "GaspLoss": ".loss",
    "GaspOutput": ".loss",
    "LayerMetrics": ".loss",
    "Matches": ".matches",
    "build_tracks": ".data.tracks",
    "frame_match": ".frame_matching",
    "gasp_loss": ".loss",
    "open_scene": ".data.scene",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name], __name__), name)
    return value


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

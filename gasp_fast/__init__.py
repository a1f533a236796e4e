"""gasp_fast: geometric supervision for vision-language models.

The loss (`gasp_loss`, `GaspLoss`, `Matches`, `frame_match`) needs torch and NumPy only. Every name is imported on first
use, so that `gasp-fast --help` and `gasp-fast doctor` do not even import torch.

CONTRIBUTING.md describes the layout of the package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gasp_fast.attachment.attach import Gasp, attach
    from gasp_fast.attachment.callback import GaspCallback
    from gasp_fast.data.scenes.open import open_scene
    from gasp_fast.data.tracks.build import build_tracks
    from gasp_fast.loss.config import LossConfig
    from gasp_fast.loss.frame_matching import FrameMatch, frame_match
    from gasp_fast.loss.function import GaspOutput, LayerMetrics, gasp_loss
    from gasp_fast.loss.matches import Matches
    from gasp_fast.loss.metric import InMetric, in_metric
    from gasp_fast.loss.module import GaspLoss
    from gasp_fast.loss.naive import naive_loss
    from gasp_fast.supervision.heads import CorrespondenceHead

__version__ = "0.1.0"

_HOME = {
    "CorrespondenceHead": "gasp_fast.supervision.heads",
    "FrameMatch": "gasp_fast.loss.frame_matching",
    "Gasp": "gasp_fast.attachment.attach",
    "GaspCallback": "gasp_fast.attachment.callback",
    "GaspLoss": "gasp_fast.loss.module",
    "GaspOutput": "gasp_fast.loss.function",
    "InMetric": "gasp_fast.loss.metric",
    "LayerMetrics": "gasp_fast.loss.function",
    "LossConfig": "gasp_fast.loss.config",
    "Matches": "gasp_fast.loss.matches",
    "attach": "gasp_fast.attachment.attach",
    "build_tracks": "gasp_fast.data.tracks.build",
    "frame_match": "gasp_fast.loss.frame_matching",
    "gasp_loss": "gasp_fast.loss.function",
    "in_metric": "gasp_fast.loss.metric",
    "naive_loss": "gasp_fast.loss.naive",
    "open_scene": "gasp_fast.data.scenes.open",
}


# What a name's module needs besides torch and NumPy, as an extra of the package.
_EXTRA = {"gasp_fast.attachment": "train", "gasp_fast.data": "data"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    try:
        module = importlib.import_module(home)
    except ModuleNotFoundError as error:
        extra = _EXTRA.get(".".join(home.split(".")[:2]))
        if extra is None or error.name is None or error.name.startswith(__name__):
            raise
        raise ModuleNotFoundError(
            f"gasp_fast.{name} needs {error.name}, which is not installed; run: pip install 'gasp-fast[{extra}]', or "
            f"in a checkout: pip install '.[{extra}]'",
            name=error.name,
        ) from error
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "CorrespondenceHead",
    "FrameMatch",
    "Gasp",
    "GaspCallback",
    "GaspLoss",
    "GaspOutput",
    "InMetric",
    "LayerMetrics",
    "LossConfig",
    "Matches",
    "attach",
    "build_tracks",
    "frame_match",
    "gasp_loss",
    "in_metric",
    "naive_loss",
    "open_scene",
]

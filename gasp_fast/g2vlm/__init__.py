"""G²VLM (arXiv 2511.21688): a language model with a geometric expert, as a second objective on this engine.

Nothing in the rest of the package imports this one. What exists so far: the transformer of two experts and its files,
the losses, the scale that aligns a prediction with the truth, the rotation nearest to a matrix, metrics, and inference.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference import ReconChat, Reconstruction, chat_with_recon, recon

__all__ = ["ReconChat", "Reconstruction", "chat_with_recon", "recon"]


def __getattr__(name: str) -> Any:
    """Names of `inference`, imported on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(".inference", __name__), name)
    return value

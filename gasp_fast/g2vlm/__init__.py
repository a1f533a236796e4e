"""G²VLM (arXiv 2511.21688): a language model with a geometric expert, as a second objective on this engine.

Nothing of GASP imports this package: only `gasp_fast/train.py` and the command line do.

model         tokens, attention, experts, heads and head_blocks, model; checkpoint and saved (files); shapes
losses        losses, dense (fused), scale, rotation
data          batch, crop, data_config, samples, question_samples, collator
training      config, objective, trained, held_out, planning and plan_tables; supervision (GASP's, by a key)
evaluation    metrics, evaluate, report, pictures, cloud
inference     inference, cache, generation, reconstruct
tiny          a small frame encoder with random weights
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

"""Every process runs the same modules in the same order at every step, whatever its batch holds.

ZeRO-3 gathers the weights of each module from all processes when it runs; ZeRO-1/2 and DDP reduce gradients in the
order in which they appear. If a process skipped a module, because its batch has no picture, no answer or no track, the
others would wait for it for ever. So no module is ever skipped:

    vision tower   a batch without frames gets one more conversation, about a blank frame, without labels
    lm head        runs on the hidden states of labelled tokens, even of none: an empty product has zero gradients
    heads, loss    run on the rows of tracked tokens, even of none

Terms that a batch lacks are exactly zero, with zero gradients, and cost almost nothing. As a side effect, logits are
only computed where there is a label: for 16 frames of 576 tokens each that is a few megabytes instead of several
gigabytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from gasp_fast.backbones import unwrap
from gasp_fast.backbones.chat import IGNORE
from gasp_fast.collator import Collator, Sample

BLANK = 56  # pixels along each side of the blank frame: small, but large enough for every processor


class SteadyCollator:
    """A `Collator` whose batches always have at least one frame. Loader workers get it pickled."""

    def __init__(self, collate: Collator) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        if not any(len(sample.frames) for sample in samples):
            samples = [*samples, Sample(frames=[np.full((BLANK, BLANK, 3), 127, np.uint8)])]
        return self.collate(samples)


def language_loss(model: nn.Module, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of the labelled tokens (0 without any), and their number.

    `hidden` [B, S, D] are the model's last states after the final norm; `labels` [B, S] are IGNORE where a token has
    none. Token t is predicted from state t - 1.
    """
    following = labels[:, 1:]
    labelled = following != IGNORE  # [B, S - 1]
    # Indexing with a mask makes the host wait for a GPU to count its rows: the one wait of a forward pass.
    rows = hidden[:, :-1][labelled]  # [K, D]
    logits = unwrap(model).get_output_embeddings()(rows).float()  # [K, V]
    count = labelled.sum()
    return F.cross_entropy(logits, following[labelled], reduction="sum") / count.clamp(min=1), count


def backbone_states(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden states after the final norm, [B, S, D]: the model without its lm head."""
    states: Tensor = unwrap(model).base_model(**inputs, use_cache=False)[0]
    return states

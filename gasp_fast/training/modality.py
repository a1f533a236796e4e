"""Every rank runs the same modules in the same order at every step, whatever its batch holds.

Under ZeRO-3 each module's weights are gathered from all ranks when it runs; under ZeRO-1/2 and DDP gradients are
reduced in the order in which they appear. A rank that skips a module, because its batch has no picture, no answer or
no track, leaves the others waiting for ever. So nothing is ever skipped:

    vision tower   a batch without any frame gets one more conversation, about a blank frame, whose words carry no label
    lm head        runs on the hidden states of labelled tokens, be they none: an empty product has zero gradients
    heads, loss    run on the rows of tracked tokens, be they none (`supervision.py`)

All terms that a batch lacks are exactly zero, gradients included, and cost next to nothing. As a side effect the
vocabulary's logits are only computed where there is a label: for 16 frames of 576 tokens that is the difference between
a few megabytes and several gigabytes.
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

BLANK = 56  # pixels along each side of a blank frame: small, and a frame to every processor


class SteadyCollator:
    """A `Collator` whose batches always hold at least one frame. Pickles into loader workers."""

    def __init__(self, collate: Collator) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        if not any(len(sample.frames) for sample in samples):
            samples = [*samples, Sample(frames=[np.full((BLANK, BLANK, 3), 127, np.uint8)])]
        return self.collate(samples)


def language_loss(model: nn.Module, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of the labelled tokens, and how many there are; 0 without any.

    `hidden` [B, S, D] are the model's last states after the final norm, `labels` [B, S] with IGNORE where there is
    none; token t is predicted from state t - 1.
    """
    following = labels[:, 1:]
    labelled = following != IGNORE  # [B, S - 1]
    # A mask on a GPU would make the host wait for the number of rows; there is one wait a step, and this is it.
    rows = hidden[:, :-1][labelled]  # [K, D]
    logits = unwrap(model).get_output_embeddings()(rows).float()  # [K, V]
    count = labelled.sum()
    return F.cross_entropy(logits, following[labelled], reduction="sum") / count.clamp(min=1), count


def backbone_states(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model without its lm head: last hidden states after the final norm, [B, S, D]."""
    states: Tensor = unwrap(model).base_model(**inputs, use_cache=False)[0]
    return states

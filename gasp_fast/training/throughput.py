"""How many operations a step needs, and how many a device could do: what MFU is a ratio of.

Knows batches and devices; what a sequence needs is counted in `workload.py`, as for the plan of a run. Only operations
that the model needs are counted, each once: neither recomputation nor anything the kernels do on top.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch

from gasp_fast.backbones import unwrap
from gasp_fast.backbones.chat import IGNORE
from gasp_fast.planning.shapes import shape_from_model
from gasp_fast.planning.workload import Sequence, operations

from .config import TrainConfig
from .model import SupervisedModel

# Dense bf16 peaks, from the vendors' data sheets; the first name that occurs in the device's own name counts.
PEAKS = {"GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
         "L40S": 362e12, "RTX 4090": 165e12, "A10": 125e12, "V100": 125e12}  # fmt: skip


@lru_cache
def peak_flops(device: torch.device) -> float:
    """Operations a second. A CPU, or a GPU that is not listed, is asked: its rate in one large product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            if known in name:
                return peak
    dtype, size = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 768)
    square = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        (square @ square)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class OperationCount:
    """Operations of a forward and backward pass, from the sequences of a batch. Made before the model is sharded."""

    def __init__(self, config: TrainConfig, model: SupervisedModel) -> None:
        self.config, self.shape = config, shape_from_model(unwrap(model.model))

    def __call__(self, sequences: Iterable[Sequence]) -> float:
        return sum(
            part.needed for sequence in sequences for part in operations(self.config, self.shape, sequence).values()
        )


def sequences_of_batch(batch: dict[str, Any], visual_token_id: int, frame_tokens: int | None) -> list[Sequence]:
    """The sequences of a collator's batch that is still on the CPU, padding included.

    Frames are told apart by the text between them, where they are not of one known size. Sequences with tracks need
    not stand in the row they came in: whatever is summed over the batch is right.
    """
    visual = batch["input_ids"] == visual_token_id  # [B, S]
    begins = visual & ~visual.roll(1, dims=1)
    labelled = (batch["labels"] != IGNORE).sum(1).tolist()
    spans = [(span.token_count, span.rows[1] - span.rows[0]) for span in batch["matches"].plan.rows.sequences()]
    spans += [(0, 0)] * (len(visual) - len(spans))
    found = []
    rows = zip(visual.sum(1).tolist(), begins.sum(1).tolist(), labelled, spans, strict=True)
    for shown, runs, answered, (tracked, anchors) in rows:
        found.append(
            Sequence(
                frames=shown // frame_tokens if frame_tokens else runs,
                tokens=batch["input_ids"].shape[1],
                visual=shown,
                tracked=tracked,
                anchors=anchors,
                labelled=answered,
            )
        )
    return found

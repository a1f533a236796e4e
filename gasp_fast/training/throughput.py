"""How many operations a step takes, and how many a device could do: what MFU is a ratio of.

Only operations that the model needs are counted, each once, and a multiplication with its addition as two: neither
recomputation under checkpointing nor anything the kernels do on top. Per token of a sequence of S:

    matrix products of the decoder   2 · weights, forward; twice that again for a backward that also trains the weights,
                                     once where they are frozen
    attention                        4 · S · width · layers / 2 (causal), forward; twice that backward
    heads                            6 · weights, on visual tokens
    geometric loss                   6 · anchors · tokens · width for each layer

The vision tower counts like the decoder, forward only where it is frozen. Its share is small, and its tokens are four
times the visual tokens, which is what it is charged for.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import torch

from gasp_fast.backbones import unwrap

from .model import SupervisedModel

# Dense bf16 peaks, from the vendors' data sheets; the first name that occurs in the device's own name counts.
PEAKS = {"GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
         "L40S": 362e12, "RTX 4090": 165e12, "A10": 125e12, "V100": 125e12}  # fmt: skip
VISION_TOKENS = 4  # of the tower for each visual token of the decoder: both families pool two by two


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
    """Operations of a forward and backward pass, from the shapes of a batch. Made before the model is sharded."""

    def __init__(self, model: SupervisedModel) -> None:
        inner = unwrap(model.model)
        decoder = model.backbone.language_model(model.model)
        self.layers = model.backbone.layer_count
        shape = model.backbone.attention_shape
        self.width = shape.query_heads * shape.head_dim
        self.decoder = sum(p.numel() for p in decoder.layers.parameters())
        outside = {id(p) for p in decoder.parameters()} | {id(p) for p in inner.get_output_embeddings().parameters()}
        self.vision = sum(p.numel() for p in inner.parameters() if id(p) not in outside)
        frozen = not any(p.requires_grad and p.ndim > 1 and "lora_" not in n for n, p in model.model.named_parameters())
        self.decoder_factor, self.vision_factor = (4, 2) if frozen else (6, 6)
        heads: list[Any] = [] if model.supervision is None else list(model.supervision.by_layer.values())
        self.heads = sum(p.numel() for head in heads for p in head.parameters())
        self.widths = sum(head.head.second.out_features for head in heads)

    def __call__(self, batch: int, length: int, visual: int, tracked: int, anchors: int) -> float:
        """`batch` sequences of `length` tokens; `visual` of all tokens show frames, `tracked` of them have matches."""
        tokens = batch * length
        return float(
            self.decoder_factor * self.decoder * tokens
            + 3 * 2 * self.layers * self.width * length * tokens
            + self.vision_factor * self.vision * VISION_TOKENS * visual
            + 6 * self.heads * tracked
            + 6 * self.widths * anchors * tracked
        )

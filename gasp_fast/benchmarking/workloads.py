"""Problems of the sizes of a training batch: random embeddings and matches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gasp_fast.loss.matches import Matches


@dataclass(frozen=True)
class Workload:
    """`A` anchors of one sequence, each with a match in every other frame; all frames of one size."""

    name: str
    layers: int
    anchors: int
    tokens: int
    width: int
    frames: int
    dtype: torch.dtype

    @property
    def tokens_per_frame(self) -> int:
        return self.tokens // self.frames

    @property
    def gemm_flops(self) -> int:
        """FLOPs of the three matrix products: similarities, row gradient, token gradient."""
        return 6 * self.layers * self.anchors * self.tokens * self.width

    def describe(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.name}: L={self.layers} A={self.anchors:,} N={self.tokens:,} D={self.width:,} F={self.frames} {kind}"
        )

    def cut_down(self) -> Workload:
        """A problem of the same kind, small enough for the float64 reference."""
        per_frame = min(self.tokens_per_frame, 48)
        frames = min(self.frames, 6)
        tokens = per_frame * frames
        return replace(
            self,
            layers=min(self.layers, 2),
            frames=frames,
            tokens=tokens,
            anchors=max(1, min(self.anchors, tokens * self.anchors // self.tokens)),
        )

    def build(self, device: torch.device, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        per_frame, tokens = self.tokens_per_frame, self.tokens_per_frame * self.frames
        rows = torch.randperm(tokens, generator=generator)[: self.anchors].sort().values
        others = max(1, self.frames - 1)
        anchor = rows.repeat_interleave(others)
        target_frame = torch.arange(others).repeat(len(rows))
        target_frame = target_frame + (target_frame >= anchor // per_frame)  # every frame but the anchor's
        target = target_frame * per_frame + torch.randint(per_frame, (len(anchor),), generator=generator)
        patch_depth = 0.5 + 3 * torch.rand(tokens, generator=generator)
        patch_depth[torch.rand(tokens, generator=generator) < 0.1] = 0.0
        matches = Matches(
            frame_offsets=torch.arange(self.frames + 1) * per_frame,
            anchor=anchor,
            target=target,
            target_depth=0.5 + 3 * torch.rand(len(anchor), generator=generator),
            patch_depth=patch_depth,
        )
        if device.type == "cuda":  # gigabytes: generated on the device
            on_device = torch.Generator(device).manual_seed(seed)
            shape = (self.layers, tokens, self.width)
            embeddings = torch.randn(shape, generator=on_device, device=device, dtype=self.dtype)
        else:
            embeddings = torch.randn(self.layers, tokens, self.width, generator=generator).to(self.dtype)
        return Problem(embeddings, matches.to(device))


@dataclass(frozen=True)
class Problem:
    embeddings: Tensor  # [L, N, D]
    matches: Matches


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("cpu-wide", 2, 512, 2304, 3584, 16, torch.float32),
        Workload("cpu-wide-bf16", 2, 512, 2304, 3584, 16, torch.bfloat16),
        Workload("cpu-narrow", 4, 512, 2304, 256, 16, torch.float32),
        Workload("w1", 28, 6912, 24 * 576, 3584, 24, torch.bfloat16),  # Qwen, fine grid, all pairs
        Workload("w2", 32, 1024, 16 * 144, 4096, 16, torch.bfloat16),  # LLaVA, coarse grid
        Workload("w3", 28, 2304, 16 * 256, 3584, 16, torch.bfloat16),
        Workload("w4", 28, 6912, 24 * 576, 256, 24, torch.bfloat16),
        Workload("w5", 1, 65536, 131072, 1024, 2, torch.bfloat16),  # a plain contrastive loss between two halves
        Workload("tiny", 2, 48, 4 * 36, 64, 4, torch.float32),
    )
}
CPU_SET = ("cpu-wide", "cpu-wide-bf16", "cpu-narrow")
GPU_SET = ("w1", "w2", "w3", "w4", "w5")

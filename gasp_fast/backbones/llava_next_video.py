"""LLaVA-NeXT-Video: its pixel -> token map and the processor's arguments.

Frames are passed as a video: each frame becomes one pooled grid of tokens, row by row, with nothing between the frames,
so frame `f` of `n` tokens is tokens `[n f, n (f + 1))`. The model takes the videos of a batch as one tensor, and each
frame is computed by itself. So the frames of all sequences are passed as one video: sequences may differ in length.

Pixel -> token: the short edge is resized to a fixed size (the long edge follows, rounded down, so that the two axes
are scaled slightly differently), the centre is cropped, the crop is cut into patches, and patches are pooled two by
two. Pixels outside the crop have no token: of a 16:9 frame that is 44 % of the width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Backbone, register
from .frames import RGBImage, one_size
from .token_grid import TokenGrid


@register
class LlavaNextVideo(Backbone):
    model_type = "llava_next_video"
    llama_layers = True

    @property
    def visual_token_id(self) -> int:
        return self.config.video_token_index

    def frame_grid(self, width: int, height: int) -> TokenGrid:
        processor = self.processor.video_processor
        resized = _resized(width, height, processor.size) if processor.do_resize else (width, height)
        cropped = (processor.crop_size["width"], processor.crop_size["height"]) if processor.do_center_crop else resized
        cell = self.config.vision_config.patch_size * self.config.spatial_pool_stride
        if cropped[0] != cropped[1] or cropped[0] % cell:
            raise ValueError(
                f"the video processor makes frames of {cropped[0]}x{cropped[1]}; LLaVA-NeXT-Video pools square frames "
                f"of a multiple of {cell} pixels, so set do_center_crop and such a crop_size"
            )
        # An axis shorter than the crop is padded, more at its end; a longer one is cut, less at its start.
        edges = []
        for original, scaled, crop in zip((width, height), resized, cropped, strict=True):
            start = (scaled - crop) // 2 if scaled >= crop else -((crop - scaled) // 2)
            edges.append((start * original / scaled, (start + crop) * original / scaled))
        (left, right), (top, bottom) = edges
        return TokenGrid(cropped[0] // cell, cropped[1] // cell, left, top, right, bottom)

    def visual_content(self, frames: int) -> list[dict[str, str]]:
        return [{"type": "video"}]

    def visual_arguments(self, batch: Sequence[Sequence[RGBImage]]) -> dict[str, Any]:
        return {"videos": [one_size(frames, index) for index, frames in enumerate(batch)], "do_sample_frames": False}

    def run_processor(self, texts: list[str], visual: dict[str, Any]) -> dict[str, Tensor]:
        """`pixel_values_videos` is `[1, F, 3, H, W]`, with the `F` frames of all sequences."""
        lists = dict(self.processor(text=texts, padding=True, padding_side="right", return_tensors=None, **visual))
        videos = lists.pop("pixel_values_videos", [])  # of each sequence with frames, [f, 3, H, W]
        inputs = {name: torch.tensor(rows) for name, rows in lists.items()}
        return {**inputs, "pixel_values_videos": torch.cat(list(videos))[None]} if len(videos) else inputs


def _resized(width: int, height: int, size: Any) -> tuple[int, int]:
    """Width and height after the processor's resize; `size` is the processor's setting."""
    sizes = {name: size[name] for name in ("height", "width", "shortest_edge", "longest_edge") if size.get(name)}
    if set(sizes) == {"height", "width"}:
        return sizes["width"], sizes["height"]
    if set(sizes) != {"shortest_edge"}:
        raise ValueError(f"the video processor has size = {sizes}; supported are shortest_edge, or height and width")
    edge, short = sizes["shortest_edge"], min(width, height)
    return (edge, int(edge * height / width)) if width == short else (int(edge * width / height), edge)

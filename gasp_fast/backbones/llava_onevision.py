"""LLaVA-OneVision: its pixel -> token map, and the token that ends a video.

The frames of a sequence are passed as one video, the form in which the model knows frames that belong together. Each
frame becomes one pooled grid of tokens, row by row. Behind the last frame comes one more visual token, a learned
newline that belongs to no frame. As images, frames would have four times as many tokens, and a single one would be cut
into tiles.

Pixel -> token: a frame is resized to a square, each axis on its own, and cut into whole patches. The last pixels that
do not fill a patch are lost: of 384 pixels, 27 patches of 14 cover 378. Pooling interpolates between patches at the
centres of half as many tokens, rounded up: 27 patches become 14 tokens, each 27 / 14 patches wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Backbone, register, unwrap
from .frames import RGBImage, one_size
from .token_grid import TokenGrid
from .token_index import TokenIndex


@register
class LlavaOnevision(Backbone):
    model_type = "llava_onevision"
    llama_layers = True

    @property
    def visual_token_id(self) -> int:
        return self.config.video_token_index

    def frame_tokens(self, input_ids: Tensor) -> Tensor:
        """Without the newline behind each video."""
        visual = input_ids == self.visual_token_id  # [B, S]
        return visual & F.pad(visual[:, 1:], (0, 1))

    def frame_grid(self, width: int, height: int) -> TokenGrid:
        processor, vision = self.processor.video_processor, self.config.vision_config
        side, size = vision.image_size, processor.size
        if (
            not processor.do_resize
            or processor.do_center_crop
            or (size.get("height"), size.get("width")) != (side, side)
        ):
            raise ValueError(
                f"the video processor has do_resize = {processor.do_resize}, size = {dict(size)} and do_center_crop = "
                f"{processor.do_center_crop}; LLaVA-OneVision takes whole frames resized to {side}x{side}"
            )
        patches = side // vision.patch_size
        tokens = -(-patches // 2)
        covered = patches * vision.patch_size / side
        return TokenGrid(tokens, tokens, 0.0, 0.0, covered * width, covered * height)

    def visual_content(self, frames: int) -> list[dict[str, str]]:
        return [{"type": "video"}]

    def visual_arguments(self, batch: Sequence[Sequence[RGBImage]]) -> dict[str, Any]:
        return {"videos": [one_size(frames, index) for index, frames in enumerate(batch)], "do_sample_frames": False}

    def run_processor(self, texts: list[str], visual: dict[str, Any]) -> dict[str, Tensor]:
        """`pixel_values_videos` is `[videos, F, 3, H, W]`; of videos of different lengths `[1, F, 3, H, W]`, of all."""
        lists = dict(self.processor(text=texts, padding=True, padding_side="right", return_tensors=None, **visual))
        videos = list(lists.pop("pixel_values_videos", []))  # of each sequence with frames, [f, 3, H, W]
        inputs = {name: torch.tensor(rows) for name, rows in lists.items()}
        if not videos:
            return inputs
        one_length = len({len(video) for video in videos}) == 1
        return {**inputs, "pixel_values_videos": torch.stack(videos) if one_length else torch.cat(videos)[None]}

    def index_tokens(self, inputs: dict[str, Tensor]) -> TokenIndex:
        tokens = (inputs["input_ids"] == self.visual_token_id).sum(1)  # [B]
        return replace(super().index_tokens(inputs), on_host={"video_tokens": tokens[tokens > 0]})

    def visual_features(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """`[V, D]`. `video_tokens` of the inputs are the tokens of each video, the newline included."""
        inner = unwrap(model).base_model
        pixels, lengths = inputs["pixel_values_videos"], inputs["video_tokens"].tolist()
        made = inner.get_video_features(pixels, return_dict=True).pooler_output
        # Later versions of transformers have added a newline behind what is one video for the model.
        frames = made[:, : (sum(lengths) - len(lengths)) // len(made)].flatten(0, 1)
        newline = inner.image_newline.to(frames.dtype)[None]
        videos = frames.split([length - 1 for length in lengths])
        return torch.cat([part for video in videos for part in (video, newline)])

"""A third backbone in one file, as a user would add it: LLaVA 1.5, every frame an image of 24 x 24 tokens."""

from typing import Any

from gasp_fast.backbones import Backbone, TokenGrid, register


@register
class Llava(Backbone):
    model_type = "llava"

    @property
    def visual_token_id(self) -> int:
        return self.config.image_token_id

    def frame_grid(self, width: int, height: int) -> TokenGrid:
        processor = self.processor.image_processor
        edge, side = processor.size["shortest_edge"], processor.crop_size["width"]
        resized = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
        left, top = ((size - side) // 2 for size in resized)
        across, down = width / resized[0], height / resized[1]
        tokens = side // self.config.vision_config.patch_size
        return TokenGrid(tokens, tokens, left * across, top * down, (left + side) * across, (top + side) * down)

    def visual_content(self, frames: int) -> list[dict[str, str]]:
        return [{"type": "image"}] * frames

    def visual_arguments(self, batch: Any) -> dict[str, Any]:
        return {"images": [frame for frames in batch for frame in frames]}

"""InternVL in transformers' own layout ("-hf"): every frame an image of one tile.

A frame is resized to the size of a tile, each axis on its own, without the crops into further tiles that the processor
makes of single images by default. The tower's patches are merged two by two, row by row: 448 x 448 pixels are 16 x 16
tokens, and no pixel is cut off. The processor puts a token before and one behind the tokens of each frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Backbone, register
from .frames import RGBImage
from .token_grid import TokenGrid

LLAMA_LIKE = ("llama", "qwen2", "qwen3")  # language models


@register
class InternVL(Backbone):
    model_type = "internvl"
    llama_layers = True

    def __init__(self, source: str, config: Any, processor: Any) -> None:
        super().__init__(source, config, processor)
        if config.text_config.model_type not in LLAMA_LIKE:
            self.llama_layers = False

    @property
    def visual_token_id(self) -> int:
        return self.config.image_token_id

    @property
    def inserted_token_ids(self) -> list[int]:
        return [self.visual_token_id, self.processor.start_image_token_id, self.processor.end_image_token_id]

    def frame_grid(self, width: int, height: int) -> TokenGrid:
        processor, vision = self.processor.image_processor, self.config.vision_config
        tile = (processor.size["height"], processor.size["width"])
        if not processor.do_resize or tile != tuple(vision.image_size):
            raise ValueError(
                f"the image processor has do_resize = {processor.do_resize} and size = {dict(processor.size)}; "
                f"InternVL takes frames resized to its tiles of {vision.image_size[1]}x{vision.image_size[0]}"
            )
        rows, columns = (
            int(side // patch * self.config.downsample_ratio)
            for side, patch in zip(tile, vision.patch_size, strict=True)
        )
        return TokenGrid(columns, rows, 0.0, 0.0, float(width), float(height))

    def visual_content(self, frames: int) -> list[dict[str, str]]:
        return [{"type": "image"}] * frames

    def visual_arguments(self, batch: Sequence[Sequence[RGBImage]]) -> dict[str, Any]:
        return {"images": [frame for frames in batch for frame in frames], "crop_to_patches": False}

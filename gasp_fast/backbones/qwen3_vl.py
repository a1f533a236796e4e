"""Qwen3-VL: features of several depths of its vision tower enter its decoder.

The last features of the tower take the place of the visual tokens, as in all of Qwen's models. Features of layers
further down are added to the states of the visual tokens after the first decoder layers (`deepstack`), so a layer's
state is what enters the next layer.

Frames are images. A video of this model has its time in seconds as text before each pair of frames, and its pixels are
limited over all frames together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Backbone, register, unwrap
from .frames import FramesAs
from .qwen_vl import QwenVL
from .token_index import TokenIndex


@register
class Qwen3VL(QwenVL):
    model_type = "qwen3_vl"

    def pass_frames_as(self, frames_as: FramesAs) -> None:
        Backbone.pass_frames_as(self, frames_as)

    def last_states(self, model: nn.Module, inputs: dict[str, Tensor], index: TokenIndex) -> Tensor:
        if not len(index.visual):
            return super().last_states(model, inputs, index)
        pixels = inputs["pixel_values"]
        made = unwrap(model).base_model.get_image_features(
            pixels, index.on_host["image_grid_thw"].to(pixels.device), return_dict=True
        )
        # By depth [V, D], which later versions of transformers split by frame.
        deeper = [one if isinstance(one, Tensor) else torch.cat(one) for one in made.deepstack_features]
        arguments = self.decoder_arguments(model, inputs, index, torch.cat(made.pooler_output))
        return self.language_model(model)(
            **arguments,
            visual_pos_masks=inputs["input_ids"] == self.visual_token_id,  # [B, S]
            deepstack_visual_embeds=deeper,
        )[0]

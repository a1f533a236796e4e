"""A new backbone in one file: LLaVA 1.5, every frame an image of 24 x 24 tokens.

The class `Llava` is all that is needed: with it, training, evaluation and export accept models of type `llava`. The
rest of this file tries it on a tiny model: encode frames, locate visual tokens, put a head on each layer, compute the
loss and its gradient. docs/extending.md explains this file.

    python examples/custom_backbone.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gasp_fast import gasp_loss
from gasp_fast.backbones import Backbone, TokenGrid, load_backbone, register
from gasp_fast.backbones.frames import RGBImage
from gasp_fast.backbones.tiny import TinyConfig, build_tiny
from gasp_fast.collator import Collator
from gasp_fast.supervision.heads import CorrespondenceHeads
from gasp_fast.supervision.layer_capture import LayerCapture


@register
class Llava(Backbone):
    model_type = "llava"  # what the model's config.json says

    @property
    def visual_token_id(self) -> int:
        return self.config.image_token_id

    def frame_grid(self, width: int, height: int) -> TokenGrid:
        processor = self.processor.image_processor
        edge, side = processor.size["shortest_edge"], processor.crop_size["width"]
        resized = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
        left, top = ((size - side) // 2 for size in resized)  # where the centre crop begins, in resized pixels
        across, down = width / resized[0], height / resized[1]  # back to pixels of the frame, each axis on its own
        tokens = side // self.config.vision_config.patch_size
        return TokenGrid(tokens, tokens, left * across, top * down, (left + side) * across, (top + side) * down)

    def visual_content(self, frames: int) -> list[dict[str, str]]:
        return [{"type": "image"}] * frames

    def visual_arguments(self, batch: Sequence[Sequence[RGBImage]]) -> dict[str, Any]:
        return {"images": [frame for frames in batch for frame in frames]}


# ---- a model to try it on --------------------------------------------------------------------------------------------


def tiny_llava(folder: Path) -> Path:
    """A random LLaVA 1.5 and its real processor in `folder`: 112 x 112 pixels are 14 x 14 tokens."""
    import transformers as hf

    with tempfile.TemporaryDirectory() as other:  # its tokenizer and chat template also fit LLaVA 1.5
        llava_video = build_tiny(Path(other) / "model", TinyConfig(model_type="llava_next_video"))
        processor = hf.AutoProcessor.from_pretrained(llava_video)
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=112, patch_size=8
    )
    text = hf.LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16384,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id)
    )
    model.save_pretrained(folder)
    hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}),
        tokenizer=processor.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    ).save_pretrained(folder)
    return folder


def main() -> None:
    from toy import room
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbone = load_backbone(tiny_llava(folder / "model"))  # chooses `Llava` by the type in config.json
        model = backbone.load_model(dtype=torch.float32)
        batch = Collator(backbone)([room(folder)])
    matches, positions = batch.pop("matches"), batch.pop("visual_positions")
    layers = range(backbone.layer_count)
    heads = CorrespondenceHeads.from_query_projections({n: backbone.query_projection(model, n) for n in layers})
    capture = LayerCapture(backbone.decoder_layers(model), backbone.final_norm(model))
    with capture:
        text_loss = model(**batch).loss
    geometry = gasp_loss([heads(n, capture.tokens(n, positions)) for n in layers], matches)
    (text_loss + geometry.loss).backward()
    gradient_norm = backbone.attention(model, 0).q_proj.weight.grad.norm()

    print(f"{type(backbone).__name__}: {backbone.layer_count} decoder layers, {backbone.hidden_size} wide")
    print(f"{len(positions)} visual tokens in 3 frames, {len(matches)} matches between them")
    print(f"losses: text {text_loss:.3f}, correspondence {geometry.corr:.3f}, depth {geometry.depth:.3f}")
    print(f"gradient at the first layer's W_Q: {gradient_norm:.2e}")


if __name__ == "__main__":
    main()

"""Qwen2.5-VL: its pixel -> token map, its faster vision modules, and the check of its three-dimensional positions.

Frames are passed as images, not as a video. A Qwen video slice merges two frames into one set of tokens; an image keeps
a token grid of its own, and its positions (temporal, row, column) are those the model was trained with for several
images in one prompt.

Pixel -> token: `smart_resize` rounds height and width separately to multiples of `patch_size * merge_size`, so the two
axes are scaled differently, and a token is one such block of the resized image. No pixel is cut off: the grid covers
the whole image, and only its numbers of columns and rows depend on the resize.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Backbone, RGBImage, register, unwrap
from .token_grid import TokenGrid
from .vision_layers import use_fast_layers
from .window_attention import BatchedWindowAttention, batch_windows


@register
class Qwen2_5_VL(Backbone):
    model_type = "qwen2_5_vl"
    host_inputs = ("image_grid_thw",)
    llama_layers = True
    host_inputs = ("image_grid_thw",)

    @property
    def visual_token_id(self) -> int:
        return self.config.image_token_id

    def frame_grid(self, width: int, height: int) -> TokenGrid:
        processor = self.processor.image_processor
        if not processor.do_resize:
            raise ValueError(
                "the image processor has do_resize = False; Qwen2.5-VL frames must be resized to whole tokens"
            )
        block = processor.patch_size * processor.merge_size
        # transformers has several processors, each with its own `smart_resize` in its module: take the one in use.
        processor_module: Any = inspect.getmodule(type(processor))
        resized_height, resized_width = processor_module.smart_resize(
            height,
            width,
            factor=block,
            min_pixels=processor.size["shortest_edge"],
            max_pixels=processor.size["longest_edge"],
        )
        return TokenGrid(resized_width // block, resized_height // block, 0.0, 0.0, float(width), float(height))

    def limit_frame_pixels(self, frame_pixels: int) -> None:
        processor = self.processor.image_processor
        block = processor.patch_size * processor.merge_size
        if frame_pixels < block * block:
            raise ValueError(f"frame_pixels = {frame_pixels} is less than one token; use at least {block * block}")
        least = min(processor.size["shortest_edge"], frame_pixels)
        processor.size = {"shortest_edge": least, "longest_edge": frame_pixels}

    def replace_slow_modules(self, model: nn.Module) -> None:
        vision = unwrap(model).model.visual
        batch_windows(vision)
        use_fast_layers(vision)
        vision.patch_embed.proj = PatchProjection(vision.patch_embed.proj)

    def visual_content(self, frames: int) -> list[dict[str, str]]:
        return [{"type": "image"}] * frames

    def visual_arguments(self, batch: Sequence[Sequence[RGBImage]]) -> dict[str, Any]:
        return {"images": [frame for frames in batch for frame in frames]}

    def check_inputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        check_mrope(model, inputs)

    def visual_features(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        vision = unwrap(model).model.visual
        if not isinstance(vision.blocks[0].attn, BatchedWindowAttention):  # transformers reads the grid on the device
            grid = inputs["image_grid_thw"].to(inputs["pixel_values"].device)
            inputs = {**inputs, "image_grid_thw": grid}
        return super().visual_features(model, inputs)

    def rotary_positions(self, inputs: dict[str, Tensor]) -> Tensor:
        """`[3, B, S]`: time, row and column of each token; 0 for padding, as in transformers."""
        visual = inputs["input_ids"] == self.visual_token_id
        merge = self.config.vision_config.spatial_merge_size
        grids = iter((inputs["image_grid_thw"][:, 1:] // merge).tolist() if "image_grid_thw" in inputs else ())
        positions = visual.new_zeros(3, *visual.shape, dtype=torch.long)
        for row, real in enumerate(inputs["attention_mask"].bool()):
            expected = _expected_positions(visual[row][real].tolist(), grids)
            positions[:, row, real] = expected.to(positions.device)
        return positions


class PatchProjection(nn.Module):
    """A 3D convolution whose kernel covers its whole input, computed as a matrix product.

    Replaces the patch embedding's `Conv3d` and uses its parameters. A module, because ZeRO-3 gathers weights by module.
    """

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = convolution.weight  # [out, C, T, p, p]
        self.bias: nn.Parameter | None = convolution.bias

    def forward(self, patches: Tensor) -> Tensor:
        """`patches [N, C, T, p, p]` -> `[N, out, 1, 1, 1]`, as the convolution returns it."""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]


def check_mrope(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Raise `ValueError` unless the model gives the visual tokens of `inputs` their three-dimensional positions.

    Without `mm_token_type_ids` (or with wrong ones, or without the image grids) the model falls back to counting
    tokens along one dimension: no error, other logits, and a training run that is wrong from its first step. This
    function compares the positions that the model derives from the inputs with an independent statement of Qwen's rule
    (`_expected_positions`). It needs no forward pass and reads no weight, so it also works on partitioned models.
    """
    qwen = unwrap(model).model
    visual = inputs["input_ids"] == qwen.config.image_token_id
    if not visual.any():
        return
    missing = [name for name in ("mm_token_type_ids", "image_grid_thw") if inputs.get(name) is None]
    if missing:
        raise ValueError(
            f"inputs lack {' and '.join(missing)}: the model would silently place visual tokens in one dimension; "
            "keep every tensor of the processor (Trainer: remove_unused_columns=False)"
        )
    input_ids, token_types = inputs["input_ids"], inputs["mm_token_type_ids"]
    if not torch.equal(token_types.bool(), visual):
        wrong = int((token_types.bool() != visual).sum())
        raise ValueError(
            f"mm_token_type_ids disagrees with input_ids at {wrong} tokens; both must come from one processor call"
        )
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    positions, _ = qwen.get_rope_index(
        input_ids, mm_token_type_ids=token_types, image_grid_thw=inputs["image_grid_thw"], attention_mask=mask
    )  # [3, B, S]
    merge = qwen.config.vision_config.spatial_merge_size
    grids = iter((inputs["image_grid_thw"][:, 1:] // merge).tolist())
    for row in range(len(input_ids)):
        real = mask[row].bool()
        expected = _expected_positions(visual[row][real].tolist(), grids).to(positions.device)
        if not torch.equal(positions[:, row][:, real], expected):
            where = int((positions[:, row][:, real] != expected).any(0).nonzero()[0])
            raise ValueError(
                f"token {where} of sequence {row} would get position {positions[:, row][:, real][:, where].tolist()} "
                f"(time, row, column) instead of {expected[:, where].tolist()}; this version of transformers computes "
                "Qwen's positions differently, use one that gasp-fast supports"
            )


def _expected_positions(visual: Sequence[bool], grids: Iterator[list[int]]) -> Tensor:
    """Qwen's rule for text and images, `[3, S]`.

    A text token advances all three coordinates by one. An image of `rows x columns` tokens starts at the next free
    position `p`: its tokens get (p, p + row, p + column), and the text after it continues at `p + max(rows, columns)`.
    """
    positions: list[tuple[int, int, int]] = []
    free = token = 0
    while token < len(visual):
        if visual[token]:
            rows, columns = next(grids)
            positions += [(free, free + row, free + column) for row in range(rows) for column in range(columns)]
            free += max(rows, columns)
            token += rows * columns
        else:
            positions.append((free, free, free))
            free += 1
            token += 1
    return torch.tensor(positions, dtype=torch.long).reshape(-1, 3).T

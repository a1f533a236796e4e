"""What Qwen's vision-language models share: the forms of frames, the pixel -> token map, three-dimensional positions.

`frames_as` chooses the form in which the model gets the frames of a sequence:

    images         each frame is an image, with a token grid and the text around an image of its own
    video_pairs    all frames are one video. The vision tower merges frames 2 i and 2 i + 1 into one grid of tokens, so
                   there are half as many; a last frame without a partner is merged with itself
    video_doubled  all frames are one video in which each comes twice, and is merged with itself: a grid for each frame

An image and a doubled frame have the same vision features, but other positions (`_expected_positions`). A video is
said to have `VIDEO_FPS` frames a second, which sets the steps of Qwen2.5-VL's positions in time.

Pixel -> token: `smart_resize` rounds height and width separately to multiples of `patch_size * merge_size`, so the two
axes are scaled differently, and a token is one such block of the resized frame. No pixel is cut off: the grid covers
the whole frame, and only its numbers of columns and rows depend on the resize.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Backbone, unwrap
from .frames import FRAMES_PER_GRID, FramesAs, RGBImage, one_size
from .token_grid import TokenGrid

VIDEO_FPS = 2.0  # the rate at which Qwen samples videos by default
IMAGE, VIDEO = 1, 2  # in mm_token_type_ids; text is 0
GRIDS = {IMAGE: "image_grid_thw", VIDEO: "video_grid_thw"}
VisualGrid = tuple[int, int, int, float]  # times, rows and columns of tokens; positions from one time to the next


class QwenVL(Backbone):
    """A Qwen whose frames are images or a video, whichever is chosen."""

    llama_layers = True
    host_inputs = ("image_grid_thw",)

    def pass_frames_as(self, frames_as: FramesAs) -> None:
        if frames_as not in FRAMES_PER_GRID:
            raise ValueError(f"frames_as = {frames_as!r} is unknown; choose one of {', '.join(FRAMES_PER_GRID)}")
        self.frames_as, self.frames_per_grid = frames_as, FRAMES_PER_GRID[frames_as]
        self.host_inputs = ("image_grid_thw",) if frames_as == "images" else ("video_grid_thw",)

    @property
    def visual_token_id(self) -> int:
        return self.config.image_token_id if self.frames_as == "images" else self.config.video_token_id

    @property
    def frame_processor(self) -> Any:
        """The part of the processor that resizes frames."""
        return self.processor.image_processor if self.frames_as == "images" else self.processor.video_processor

    def frame_grid(self, width: int, height: int) -> TokenGrid:
        processor = self.frame_processor
        if not processor.do_resize:
            name = type(processor).__name__
            raise ValueError(f"the {name} has do_resize = False; Qwen's frames must be resized to whole tokens")
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
        processor = self.frame_processor
        block = processor.patch_size * processor.merge_size
        if frame_pixels < block * block:
            raise ValueError(f"frame_pixels = {frame_pixels} is less than one token; use at least {block * block}")
        least = min(processor.size["shortest_edge"], frame_pixels)
        processor.size = {"shortest_edge": least, "longest_edge": frame_pixels}

    def replace_slow_modules(self, model: nn.Module) -> None:
        vision = unwrap(model).model.visual
        vision.patch_embed.proj = PatchProjection(vision.patch_embed.proj)

    def visual_content(self, frames: int) -> list[dict[str, str]]:
        return [{"type": "image"}] * frames if self.frames_as == "images" else [{"type": "video"}]

    def visual_arguments(self, batch: Sequence[Sequence[RGBImage]]) -> dict[str, Any]:
        if self.frames_as == "images":
            return {"images": [frame for frames in batch for frame in frames]}
        videos = [one_size(frames, index) for index, frames in enumerate(batch)]  # [F, H, W, 3] each
        if self.frames_as == "video_doubled":
            videos = [np.repeat(video, 2, axis=0) for video in videos]
        metadata = [{"fps": VIDEO_FPS, "total_num_frames": len(video)} for video in videos]
        # No cap: a frame's size must not depend on the number of frames.
        exact = {"do_sample_frames": False, "cap_pixels_per_frame": False}
        return {"videos": videos, "video_metadata": metadata, **exact}

    def check_inputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        check_mrope(model, inputs)

    def visual_features(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        if not self.reads_grids_on_host(model):
            device = inputs["pixel_values" if self.frames_as == "images" else "pixel_values_videos"].device
            inputs = {**inputs, **{name: inputs[name].to(device) for name in self.host_inputs}}
        return super().visual_features(model, inputs)

    def reads_grids_on_host(self, model: nn.Module) -> bool:
        """Whether the vision tower takes the sizes of frames from the CPU. transformers' takes them beside pixels."""
        return False

    def rotary_positions(self, inputs: dict[str, Tensor]) -> Tensor:
        """`[3, B, S]`: time, row and column of each token; 0 for padding, as in transformers."""
        kinds = _kinds(self.config, inputs["input_ids"])  # [B, S]
        grids = _visual_grids(self.config.vision_config, inputs)
        positions = kinds.new_zeros(3, *kinds.shape)
        for row, real in enumerate(inputs["attention_mask"].bool()):
            expected = _expected_positions(kinds[row][real].tolist(), grids)
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

    Without `mm_token_type_ids` (or with wrong ones, or without the grids) the model falls back to counting tokens along
    one dimension: no error, other logits, and a training run that is wrong from its first step. This function compares
    the positions that the model derives from the inputs with an independent statement of Qwen's rule
    (`_expected_positions`). It needs no forward pass and reads no weight, so it also works on partitioned models.
    """
    qwen = unwrap(model).model
    input_ids = inputs["input_ids"]
    kinds = _kinds(qwen.config, input_ids)
    needed = [name for kind, name in GRIDS.items() if (kinds == kind).any()]
    if "video_grid_thw" in needed and _in_seconds(qwen.config.vision_config):
        needed.append("second_per_grid_ts")
    if not needed:
        return
    missing = [name for name in ("mm_token_type_ids", *needed) if inputs.get(name) is None]
    if missing:
        raise ValueError(
            f"inputs lack {' and '.join(missing)}: the model would silently place visual tokens in one dimension, or "
            "at other times; keep every tensor of the processor (Trainer: remove_unused_columns=False)"
        )
    token_types = inputs["mm_token_type_ids"]
    if not torch.equal(token_types.long(), kinds):
        wrong = int((token_types.long() != kinds).sum())
        raise ValueError(
            f"mm_token_type_ids disagrees with input_ids at {wrong} tokens; both must come from one processor call"
        )
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    positions, _ = qwen.get_rope_index(
        input_ids, mm_token_type_ids=token_types, attention_mask=mask, **{name: inputs[name] for name in needed}
    )  # [3, B, S]
    grids = _visual_grids(qwen.config.vision_config, inputs)
    for row in range(len(input_ids)):
        real = mask[row].bool()
        expected = _expected_positions(kinds[row][real].tolist(), grids).to(positions.device)
        if not torch.equal(positions[:, row][:, real], expected):
            where = int((positions[:, row][:, real] != expected).any(0).nonzero()[0])
            raise ValueError(
                f"token {where} of sequence {row} would get position {positions[:, row][:, real][:, where].tolist()} "
                f"(time, row, column) instead of {expected[:, where].tolist()}; this version of transformers computes "
                "Qwen's positions differently, use one that gasp-fast supports"
            )


def _kinds(config: Any, input_ids: Tensor) -> Tensor:
    """What each token is of: text, an image or a video. int64 `[B, S]`."""
    return (input_ids == config.image_token_id) * IMAGE + (input_ids == config.video_token_id) * VIDEO


def _in_seconds(config: Any) -> bool:
    """Whether positions in time depend on seconds, as in Qwen2.5-VL. `config` is that of the vision tower."""
    return hasattr(config, "tokens_per_second")


def _visual_grids(config: Any, inputs: Mapping[str, Tensor]) -> dict[int, Iterator[VisualGrid]]:
    """The grids of the images and of the videos of `inputs`, in order. `config` is that of the vision tower."""
    grids: dict[int, Iterator[VisualGrid]] = {}
    for kind, name in GRIDS.items():
        sizes = inputs[name].tolist() if name in inputs else []
        steps = [1.0] * len(sizes)
        if kind == VIDEO and sizes and _in_seconds(config):
            steps = [config.tokens_per_second * seconds for seconds in inputs["second_per_grid_ts"].tolist()]
        merge = config.spatial_merge_size
        grids[kind] = iter(
            [(times, rows // merge, columns // merge, step)
             for (times, rows, columns), step in zip(sizes, steps, strict=True)]
        )  # fmt: skip
    return grids


def _expected_positions(kinds: Sequence[int], grids: Mapping[int, Iterator[VisualGrid]]) -> Tensor:
    """Qwen's rule for text, images and videos, `[3, S]`.

    A text token advances all three coordinates by one. A grid of `times x rows x columns` tokens starts at the next
    free position `p`: its tokens get (p + time * step, p + row, p + column), the first rounded down, and the text after
    it continues at `p + max(rows, columns)`. An image has one time.
    """
    positions: list[tuple[int, int, int]] = []
    free = token = 0
    while token < len(kinds):
        if kinds[token]:
            times, rows, columns, step = next(grids[kinds[token]])
            positions += [
                (free + int(time * step), free + row, free + column)
                for time in range(times)
                for row in range(rows)
                for column in range(columns)
            ]
            free += max(rows, columns)
            token += times * rows * columns
        else:
            positions.append((free, free, free))
            free += 1
            token += 1
    return torch.tensor(positions, dtype=torch.long).reshape(-1, 3).T

"""`DiscoveredBackbone`: a model without a file of its own here, whose parts are found in the loaded model.

It serves `gasp_fast.attach`, which needs less of a model than training, evaluation and export do. What is found, and
how:

    decoder layers   `model.get_decoder()`, and in it the list of as many layers as the text configuration has
    final norm       the decoder's `norm`, or another usual name
    W_Q              `q_proj` of a layer's attention, or the first rows of `qkv_proj`
    visual tokens    `image_token_id` of the configuration or of the processor

The map from pixels to tokens is measured: the processor gets a picture whose red is each pixel's column and whose green
is its row, and what comes out shows which rectangle of the picture it keeps. This is possible if the processor makes
one resized and cropped picture of a frame (`pixel_values [1, 3, H, W]`), with tokens that divide it evenly, row by row.
Whatever is not found is an error that names the argument of `attach` which states it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gasp_fast.files import one_line

from .base import Backbone, unwrap
from .frames import RGBImage
from .token_grid import TokenGrid

FrameGrid = Callable[[int, int], TokenGrid]  # (width, height) of a frame -> where its tokens lie
ATTENTIONS = ("self_attn", "attention", "self_attention", "attn")
NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
LARGEST_ERROR = 0.02  # of a measured column or row, in parts of the picture: 8 bits are exact to 0.002


class DiscoveredBackbone(Backbone):
    """The parts of `model`; `frame_grid` and `visual_token_id` state what cannot be found."""

    model_type = "discovered"

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        frame_grid: FrameGrid | None = None,
        visual_token_id: int | None = None,
    ) -> None:
        inner = unwrap(model)
        super().__init__(getattr(inner, "name_or_path", ""), inner.config, processor)
        self._visual_token_id = visual_token_id
        self._frame_grid = cache(self._measure_grid if frame_grid is None else frame_grid)

    # ---- the model's modules -----------------------------------------------------------------------------------------

    def language_model(self, model: nn.Module) -> Any:
        inner = unwrap(model)
        decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
        owners = [module for module in decoder.modules() if self._layers_in(module) is not None]
        if len(owners) != 1:
            raise ValueError(
                f"model: {len(owners)} modules of {type(inner).__name__} hold {self.layer_count} decoder layers, and "
                "one was expected; write a backbone for this model (docs/extending.md)"
            )
        return owners[0]

    def _layers_in(self, module: nn.Module) -> nn.ModuleList | None:
        lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
        lists = [child for child in lists if len(child) == self.layer_count and _first(child[0], ATTENTIONS)]
        return lists[0] if len(lists) == 1 else None

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        layers = self._layers_in(self.language_model(model))
        assert layers is not None
        return layers

    def final_norm(self, model: nn.Module) -> nn.Module:
        decoder = self.language_model(model)
        norm = _first(decoder, NORMS)
        if norm is None:
            raise ValueError(
                f"model: {type(decoder).__name__} has no final norm of a usual name ({', '.join(NORMS)}); write a "
                "backbone for this model (docs/extending.md)"
            )
        return norm

    def attention(self, model: nn.Module, layer: int) -> Any:
        return _first(self.decoder_layers(model)[layer], ATTENTIONS)

    def query_projection(self, model: nn.Module, layer: int) -> tuple[Tensor, Tensor | None]:
        attention = self.attention(model, layer)
        if (queries := getattr(attention, "q_proj", None)) is not None:
            return queries.weight, queries.bias
        if (joint := getattr(attention, "qkv_proj", None)) is not None:  # queries, keys and values, in this order
            shape = self.attention_shape
            outputs = shape.query_heads * shape.head_dim
            return joint.weight[:outputs], None if joint.bias is None else joint.bias[:outputs]
        raise ValueError(
            f'init = "svd": {type(attention).__name__} has neither q_proj nor qkv_proj to start from; use '
            'init="random", or write a backbone for this model (docs/extending.md)'
        )

    # ---- visual tokens -----------------------------------------------------------------------------------------------

    @property
    def visual_token_id(self) -> int:
        if self._visual_token_id is not None:
            return self._visual_token_id
        for owner in (self.config, self.processor):
            for name in ("image_token_id", "image_token_index"):
                if isinstance(found := getattr(owner, name, None), int):
                    return found
        raise ValueError(
            "visual_token_id = None: neither the model's configuration nor the processor has an image_token_id; pass "
            "the id that marks a visual token in input_ids"
        )

    def frame_grid(self, width: int, height: int) -> TokenGrid:
        return self._frame_grid(width, height)

    def visual_content(self, frames: int) -> list[dict[str, str]]:
        return [{"type": "image"}] * frames

    def visual_arguments(self, batch: Sequence[Sequence[RGBImage]]) -> dict[str, Any]:
        return {"images": [list(frames) for frames in batch]}

    # ---- the measured map --------------------------------------------------------------------------------------------

    def _measure_grid(self, width: int, height: int) -> TokenGrid:
        """The map of a frame, from what the processor makes of a picture of positions."""
        x = np.linspace(0, 255, width)[None, :].repeat(height, axis=0)
        y = np.linspace(0, 255, height)[:, None].repeat(width, axis=1)
        positions = np.stack([x, y, 0 * x], axis=-1).round().astype(np.uint8)
        tokens, seen = self._processed(positions)  # [3, H, W]
        black, white = (self._processed(np.full_like(positions, value))[1] for value in (0, 255))
        if not (white > black).all():
            self._refuse_grid(width, height, "its processor does not keep white above black")
        share = (seen - black) / (white - black)  # [3, H, W]: red and green are shares of width and height
        left, right, across = _line(np.median(share[0], axis=0))
        top, bottom, down = _line(np.median(share[1], axis=1))
        if max(across, down) > LARGEST_ERROR:
            self._refuse_grid(width, height, "its processor pads the frame or distorts it")
        rows_, columns_ = seen.shape[1:]
        columns = round(math.sqrt(tokens * columns_ / rows_))
        rows = round(tokens / max(columns, 1))
        if columns * rows != tokens or abs(columns * rows_ - rows * columns_) > 0.01 * columns * rows_:
            self._refuse_grid(width, height, f"{tokens} tokens do not divide {columns_}x{rows_} pixels evenly")
        # The first and last pixel centres have the shares 0 and 1.
        x_edges = [0.5 + float(at) * (width - 1) for at in (left, right)]
        y_edges = [0.5 + float(at) * (height - 1) for at in (top, bottom)]
        return TokenGrid(columns, rows, x_edges[0], y_edges[0], x_edges[1], y_edges[1])

    def _processed(self, image: RGBImage) -> tuple[int, NDArray[np.float64]]:
        """What the processor makes of one frame: the number of visual tokens, and pixels `[3, H, W]`."""
        height, width = image.shape[:2]
        placeholder = getattr(self.processor, "image_token", None)
        if placeholder is None:
            self._refuse_grid(width, height, f"{type(self.processor).__name__} has no image_token")
        try:
            made = self.processor(text=[placeholder], images=[image], return_tensors="pt")
        except Exception as error:
            tokenizer = getattr(self.processor, "tokenizer", None)
            if "NoneType" in str(error) and getattr(tokenizer, "bos_token", "") is None:
                raise ValueError(
                    f"processor: {type(self.processor).__name__} fails on one frame ({one_line(error)}), and its "
                    "tokenizer has no BOS token; give it one, as the pretrained tokenizer has: "
                    'processor.tokenizer.add_special_tokens({"bos_token": "<bos>"})'
                ) from error
            self._refuse_grid(width, height, f"its processor fails on one frame: {one_line(error)}")
        pixels = torch.as_tensor(made["pixel_values"]).double()
        if pixels.ndim < 3 or pixels.shape[-3] != 3 or pixels[..., 0, 0].numel() != 3:
            self._refuse_grid(width, height, f"its processor makes pixel_values {list(pixels.shape)} of one frame")
        tokens = int((made["input_ids"] == self.visual_token_id).sum())
        return tokens, pixels.reshape(pixels.shape[-3:]).numpy()

    def _refuse_grid(self, width: int, height: int, reason: str) -> Any:
        raise ValueError(
            f"frame_grid = None: the map from pixels to tokens cannot be measured for a frame of {width}x{height}, "
            f"because {reason}; pass attach(..., frame_grid=...), a function (width, height) -> TokenGrid"
        )


def _first(module: nn.Module, names: Sequence[str]) -> nn.Module | None:
    """The first submodule of one of these names."""
    return next((found for name in names if isinstance(found := getattr(module, name, None), nn.Module)), None)


def _line(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Where a line through pixel values begins and ends, half a pixel beyond them, and its largest error.

    The pixels at either end are left out: resize filters bend there.
    """
    at = np.arange(len(values)) + 0.5
    inner = slice(len(values) // 8, len(values) - len(values) // 8)
    slope, start = np.polyfit(at[inner], values[inner], 1)
    error = np.abs(start + slope * at - values).max()
    return start, start + slope * len(values), float(error)

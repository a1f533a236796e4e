"""A small frame encoder with random weights, of the real class, for the demo and for tests.

The small Qwen2-VL beside it is that of `gasp_fast.backbones.tiny`, with `model_type="qwen2_vl"` and `patch_size=14`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

import gasp_fast.backbones  # noqa: F401 (before transformers, which may not find torchvision otherwise)

from .batch import PATCH

POSITION = 0.5  # standard deviation of position embeddings; 0.02 in transformers


def build_tiny_encoder(
    folder: str | os.PathLike[str], width: int = 192, layers: int = 1, heads: int = 4, seed: int = 0
) -> Path:
    """Write a DINOv2 with registers to `folder`.

    Its position embeddings are as large as the patches' embeddings. With the 25 times smaller ones of a new model the
    experts hardly know where a patch is in its frame: frequencies of Qwen2-VL's rotation by column are below 2e-4.
    """
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(seed)
    config = Dinov2WithRegistersConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        mlp_ratio=2,
        patch_size=PATCH,
        image_size=8 * PATCH,
        layerscale_value=1.0,  # a trained one has learned to use its layers
        num_register_tokens=2,
    )
    model = Dinov2WithRegistersModel(config)
    torch.nn.init.normal_(model.embeddings.position_embeddings, std=POSITION)
    model.save_pretrained(folder)
    return Path(folder)

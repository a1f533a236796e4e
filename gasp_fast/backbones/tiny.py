"""Small random models for the demo, the tests and the examples, created without a download.

They use transformers' own model, processor and tokenizer classes, so all code for a 7B model also runs on them, in
milliseconds. A 224x224 frame becomes 14x14 tokens in every family. The default sizes learn correspondence on a CPU
within minutes.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from gasp_fast.files import complete_folder

from .tiny_families import BUILDERS
from .tiny_parts import TinyConfig

# The sizes of both 7B models (with a tiny tokenizer), for benchmarks and FLOP counts with random weights.
SIZES_7B = {
    "qwen2_5_vl": TinyConfig(
        model_type="qwen2_5_vl", hidden_size=3584, layers=28, query_heads=28, key_heads=4, intermediate_size=18944,
        embeddings=152064, vision_depth=32, vision_hidden_size=1280, vision_heads=16, vision_intermediate_size=3420,
        vision_full_layers=(7, 15, 23, 31), patch_size=14, frame_size=672, context=128000,
    ),
    "llava_next_video": TinyConfig(
        model_type="llava_next_video", hidden_size=4096, layers=32, query_heads=32, key_heads=32,
        intermediate_size=11008, embeddings=32064, vision_depth=23, vision_hidden_size=1024, vision_heads=16,
        vision_intermediate_size=4096, patch_size=14, frame_size=336, context=4096,
    ),
}  # fmt: skip


def build_tiny(folder: str | os.PathLike[str], config: TinyConfig | None = None, weights: bool = True) -> Path:
    """Write a tiny model and its processor to `folder`, for `from_pretrained`. An error leaves no folder behind.

    Without `weights`, write only configuration and processor, for a model whose weights are created in memory.
    """
    config = TinyConfig() if config is None else config
    if config.model_type not in BUILDERS:
        raise ValueError(f"model_type = {config.model_type!r} has no tiny version; choose one of {', '.join(BUILDERS)}")
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"folder = {str(folder)!r} exists already; remove it, or name another one")
    model_class, model_config, processor = BUILDERS[config.model_type](config)
    with complete_folder(folder) as partial:
        if weights:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                model_class(model_config).save_pretrained(partial)
        else:
            model_config.save_pretrained(partial)
        processor.save_pretrained(partial)
    return folder

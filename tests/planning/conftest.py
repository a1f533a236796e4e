from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_training import *  # noqa: F403 (fixtures)

from gasp_fast.backbones import Conversation, load_backbone, tiny
from gasp_fast.planning.shapes import ModelShape, shape_from_source


@pytest.fixture(scope="session", params=["qwen2_5_vl", "llava_next_video"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelShape]:
    """A tiny backbone, and its shape."""
    config = tiny.TinyConfig(model_type=request.param, hidden_size=256)
    folder = tiny.build_tiny(tmp_path_factory.mktemp("plan") / request.param, config)
    return load_backbone(folder), shape_from_source(str(folder))


@pytest.fixture
def inputs(small: tuple[Any, ModelShape]) -> dict[str, torch.Tensor]:
    """A conversation about four frames, as the tiny model takes it."""
    pictures = [np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in range(4)]
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "There are 3."}]
    encoded = small[0].encode([Conversation(pictures, messages)]).inputs
    return {name: value for name, value in encoded.items() if name != "labels"}

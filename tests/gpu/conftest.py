"""Tiny models, rendered rooms, and questions about frames of rooms, which need no video decoder.

Run them with `python -m pytest -m gpu tests/gpu`. They need what training needs (`pip install '.[train]'`), but for
DeepSpeed and PyAV.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.g2vlm_training import *  # noqa: F403 (fixtures)
from support.tiny_training import *  # noqa: F403 (fixtures)
from support.tiny_training import Assets, TrainConfig, write_questions

from gasp_fast.backbones import load_backbone


@pytest.fixture
def settings(config: Callable[..., TrainConfig], assets: Assets, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Configurations of small runs on scenes and on questions about what the model sees of them."""

    def make(family: str = "qwen2_5_vl", **parts: dict[str, Any]) -> TrainConfig:
        seen = load_backbone(assets.models[family]).frame_grid(96, 80).rectangle
        root = write_questions(tmp_path / "questions", assets.scenes, seen)
        return config(family, qa={"root": str(root), "frames": None}, **parts)

    return make

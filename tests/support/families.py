"""Tiny models of the real classes with their real processors, created once a session."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gasp_fast.backbones import Backbone, Conversation, load_backbone, tiny

torch.set_num_threads(1)
FAMILIES = ("qwen2_5_vl", "llava_next_video", "llava")


@dataclass(frozen=True)
class Family:
    """A backbone with a model, and facts about the model that only tests need."""

    backbone: Backbone
    model: Any
    folder: Path

    @property
    def token_pixels(self) -> int:
        """Edge of a token in pixels of the resized frame."""
        return 8 if self.backbone.model_type == "llava" else 16

    def visual_features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The features that the model's vision side computes from the inputs, `[N, D]` in its own order."""
        inner = self.model.model
        if self.backbone.model_type == "qwen2_5_vl":
            features = inner.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        elif self.backbone.model_type == "llava_next_video":
            features = inner.get_video_features(inputs["pixel_values_videos"], return_dict=True)
        else:
            features = inner.get_image_features(inputs["pixel_values"], return_dict=True)
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in features.pooler_output])

    def pixels_by_token(self, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
        """The processor's pixel values grouped by token, `[frames, tokens, values]`."""
        if self.backbone.model_type == "qwen2_5_vl":  # patches of one merge block are adjacent
            return inputs["pixel_values"].reshape(-1, tokens, 4 * inputs["pixel_values"].shape[-1])
        frames = inputs.get("pixel_values_videos", inputs.get("pixel_values"))
        frames = frames.reshape(-1, *frames.shape[-3:])  # [F, 3, S, S]
        cell = frames.shape[-1] // round(tokens**0.5)
        blocks = frames.unfold(2, cell, cell).unfold(3, cell, cell)  # [F, 3, rows, columns, cell, cell]
        return blocks.permute(0, 2, 3, 1, 4, 5).reshape(len(frames), tokens, -1)


def _third_backbone() -> Any:
    """The module `examples/custom_backbone.py`. Importing it registers its backbone."""
    path = Path(__file__).parents[2] / "examples" / "custom_backbone.py"
    spec = importlib.util.spec_from_file_location("custom_backbone", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    example = _third_backbone()
    by_name = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp("tiny") / name
        if name == example.Llava.model_type:
            example.tiny_llava(folder)
        else:
            tiny.build_tiny(folder, tiny.TinyConfig(model_type=name))
        backbone = load_backbone(folder)
        by_name[name] = Family(backbone, backbone.load_model(dtype=torch.float32).eval(), folder)
    return by_name


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    """Each family that the package ships, and a third one that examples/custom_backbone.py defines."""
    return families[request.param]


@pytest.fixture(params=FAMILIES[:2])
def shipped(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    """Each family that the package ships."""
    return families[request.param]


@pytest.fixture
def qwen(families: dict[str, Family]) -> Family:
    return families["qwen2_5_vl"]


@pytest.fixture
def llava_video(families: dict[str, Family]) -> Family:
    return families["llava_next_video"]


def talk(frames: list[np.ndarray], answer: str | None = "There are 3 boxes.") -> Conversation:
    messages = [{"role": "user", "content": "How many boxes are in the room?"}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return Conversation(frames, messages)


def noise(count: int, width: int = 224, height: int = 224, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]


@pytest.fixture(name="talk")
def talk_fixture() -> Any:
    return talk


@pytest.fixture(name="noise")
def noise_fixture() -> Any:
    return noise

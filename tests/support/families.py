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
QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
# model_type: `token_pixels`, `vision_method` and `vision_inputs` of the `Family`, and maybe `frame_tokens`
FAMILIES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(QWENS, (16, "get_image_features", ("pixel_values", "image_grid_thw"))),
    "llava_next_video": (16, "get_video_features", ("pixel_values_videos",)),
    "llava_onevision": (16, "get_video_features", ("pixel_values_videos",), 196),
    "internvl": (16, "get_image_features", ("pixel_values",)),
    "llava": (8, "get_image_features", ("pixel_values",)),
}
SHIPPED = tuple(name for name in FAMILIES if name != "llava")  # which examples/custom_backbone.py defines
# A test of what families define runs for every family, any other test for a few.
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES, indirect=True)
EVERY_SHIPPED = pytest.mark.parametrize("shipped", SHIPPED, indirect=True)
EVERY_QWEN = pytest.mark.parametrize("qwen", QWENS, indirect=True)


@dataclass(frozen=True)
class Family:
    """A backbone with a model, and facts about the model that only tests need."""

    backbone: Backbone
    model: Any
    folder: Path
    token_pixels: int  # edge of a token in pixels of the resized frame
    vision_method: str  # method of the inner model that computes its visual features
    vision_inputs: tuple[str, ...]  # its arguments; the first are the pixel values
    frame_tokens: int = 1  # features of a frame, where others may follow those of a sequence's frames

    def visual_features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The features of frames that the model's vision side computes from the inputs, `[N, D]` in its own order."""
        compute = getattr(self.model.model, self.vision_method)
        features = compute(*(inputs[name] for name in self.vision_inputs), return_dict=True)
        parts = [part.reshape(-1, part.shape[-1]) for part in features.pooler_output]
        return torch.cat([part[: len(part) - len(part) % self.frame_tokens] for part in parts])

    def pixels_by_token(self, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
        """The processor's pixel values grouped by token, `[frames, tokens, values]`."""
        pixels = inputs[self.vision_inputs[0]]
        if pixels.dim() == 2:  # [patches, values]; the four patches of a token are adjacent
            return pixels.reshape(-1, tokens, 4 * pixels.shape[-1])
        frames = pixels.reshape(-1, *pixels.shape[-3:])  # [F, 3, S, S]
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


class Families(dict[str, Family]):
    """The families by name, each made when it is first used."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root, self.example = root, _third_backbone()

    def __missing__(self, name: str) -> Family:
        folder = self.root / name
        if name in SHIPPED:
            tiny.build_tiny(folder, tiny.TinyConfig(model_type=name))
        else:
            self.example.tiny_llava(folder)
        backbone = load_backbone(folder)
        self[name] = Family(backbone, backbone.load_model(dtype=torch.float32).eval(), folder, *FAMILIES[name])
        return self[name]


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["qwen2_5_vl", "llava_next_video", "llava"])
def family(request: pytest.FixtureRequest, families: Families) -> Family:
    """A family of each kind, and one that examples/custom_backbone.py defines."""
    return families[request.param]


@pytest.fixture(params=["qwen2_5_vl", "llava_next_video"])
def shipped(request: pytest.FixtureRequest, families: Families) -> Family:
    """A family of each kind that the package ships."""
    return families[request.param]


@pytest.fixture(params=["qwen2_5_vl"])
def qwen(request: pytest.FixtureRequest, families: Families) -> Family:
    return families[request.param]


@pytest.fixture
def llava_video(families: Families) -> Family:
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

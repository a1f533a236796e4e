"""Tiny models of both families, with grouped-query and full attention, and an evaluation set of small scenes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.connections import *  # noqa: F403 (fixtures)
from support.recorded import recorded_scene

from gasp_fast.backbones import tiny
from gasp_fast.cli import main as gasp_fast
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes
from gasp_fast.evaluation.dataset import EvaluationSet, EvaluationSetConfig
from gasp_fast.evaluation.evaluated_model import EvaluatedModel, load_evaluated_model

torch.set_num_threads(1)
SIZE = 112  # pixels of a frame: 7 x 7 tokens
MODELS = {
    "qwen-gqa": tiny.TinyConfig(frame_size=SIZE, key_heads=2),
    "qwen-mha": tiny.TinyConfig(frame_size=SIZE, key_heads=4),
    "llava": tiny.TinyConfig(model_type="llava_next_video", frame_size=SIZE),
    "qwen3": tiny.TinyConfig(model_type="qwen3_vl", frame_size=SIZE),  # with norms of queries and keys
}


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.build_tiny(root / name, config) for name, config in MODELS.items()}


@pytest.fixture(scope="session")
def models(model_folders: dict[str, Path]) -> dict[str, EvaluatedModel]:
    return {name: load_evaluated_model(folder, initial_heads=True) for name, folder in model_folders.items()}


@pytest.fixture(params=["qwen-gqa", "qwen-mha", "llava"])
def model(request: pytest.FixtureRequest, models: dict[str, EvaluatedModel]) -> EvaluatedModel:
    return models[request.param]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rendered scenes of 16 frames."""
    root = tmp_path_factory.mktemp("scenes")
    list(render_scenes(root, 3, config=SyntheticConfig(frames=16, width=SIZE, height=SIZE), workers=1))
    return root


@pytest.fixture(scope="session")
def dataset(library: Path) -> EvaluationSet:
    return EvaluationSet(library, EvaluationSetConfig(sequences=5, frames=4, grid=5, max_gap=8))


@pytest.fixture(scope="session")
def compared(model_folders: dict[str, Path], library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two reports, `before` and `after`, on the same sequences, and their `comparison`."""
    root = tmp_path_factory.mktemp("compared")
    options = ["--sequences", "4", "--frames", "5", "--grid", "5", "--max-gap", "8", "--pictures", "2"]
    for name, model in (("before", "qwen-gqa"), ("after", "qwen-mha")):
        where = ["--model", str(model_folders[model]), "--scenes", str(library), "--out", str(root / name)]
        assert gasp_fast(["evaluate", *where, *options, "--features", "head,qk"]) == 0
    reports = [str(root / "before"), str(root / "after")]
    assert gasp_fast(["compare", *reports, "--names", "before,after", "--out", str(root / "comparison")]) == 0
    return root


@pytest.fixture(scope="session")
def recorded() -> Callable[[str], Path]:
    """The folder of a recorded scene by name; recorded scenes are not part of the repository."""
    return recorded_scene

"""Rendered scenes, whose photographs, depth and poses are exact up to exposure and noise."""

from __future__ import annotations

from pathlib import Path

import pytest

from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes

SEEDS = 2


@pytest.fixture(scope="session")
def rendered_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rendered")
    for _ in render_scenes(folder, SEEDS, seed=0, config=SyntheticConfig(frames=16)):
        pass
    return folder


@pytest.fixture
def scene_room(rendered_folder: Path) -> Scene:
    return open_scene(rendered_folder / "scene-000000")


@pytest.fixture(params=range(SEEDS))
def scene_rendered(request: pytest.FixtureRequest, rendered_folder: Path) -> Scene:
    return open_scene(rendered_folder / f"scene-{request.param:06d}")

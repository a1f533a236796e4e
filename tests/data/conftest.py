"""Fixtures for scenes: a small world whose geometry is known in closed form, and recorded scenes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.box_world import BoxWorld
from support.recorded import recorded_scene

from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene


@pytest.fixture(scope="session")
def scene_world() -> BoxWorld:
    return BoxWorld()


@pytest.fixture(scope="session")
def scene_boxes_folder(scene_world: BoxWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world on disk, layout `rgbd`. Shared: copy it before changing it."""
    return scene_world.write_rgbd(tmp_path_factory.mktemp("boxes") / "boxes")


@pytest.fixture
def scene_boxes(scene_boxes_folder: Path) -> Scene:
    return open_scene(scene_boxes_folder)


@pytest.fixture(scope="session")
def scene_recorded() -> Callable[[str], Scene]:
    """A recorded scene by name, if this machine has it."""

    return lambda name: open_scene(recorded_scene(name))


@pytest.fixture(params=["hololens_dvmvs_a", "apc_shelf_glue"])
def scene_real(request: pytest.FixtureRequest, scene_recorded: Callable[[str], Scene]) -> Scene:
    return scene_recorded(request.param)

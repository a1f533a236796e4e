"""Scenes, settings and their annotations, computed once."""

from __future__ import annotations

from pathlib import Path

import pytest

from gasp_fast.data.annotations.read import AnnotationReader
from gasp_fast.data.annotations.settings import AnnotationSettings
from gasp_fast.data.annotations.write import annotate
from gasp_fast.data.scenes.library import SceneEntry, find_scenes, survey
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes
from gasp_fast.data.tracks.sequences import SequenceConfig


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    list(render_scenes(folder, 3, config=SyntheticConfig(frames=12, width=96, height=96, samples=1)))
    return folder


@pytest.fixture(scope="session")
def settings(library: Path) -> AnnotationSettings:
    entries = [entry for entry in survey(library, find_scenes(library)) if isinstance(entry, SceneEntry)]
    return AnnotationSettings(
        scenes=tuple(entries),
        sequences=SequenceConfig(min_frames=4, max_frames=8, per_scene=6, seed=1),
        shard_size=4,
        epochs=2,
    )


@pytest.fixture(scope="session")
def cache(library: Path, settings: AnnotationSettings, tmp_path_factory: pytest.TempPathFactory) -> AnnotationReader:
    folder = tmp_path_factory.mktemp("cache")
    assert list(annotate(library, folder, settings)) == list(range(settings.shards))
    return AnnotationReader(folder)

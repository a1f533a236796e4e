"""Settings determine all annotations, are small, and are never mixed with others."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gasp_fast.data.annotations.read import AnnotationReader
from gasp_fast.data.annotations.settings import AnnotationSettings, store_settings
from gasp_fast.data.annotations.shard import shard_path
from gasp_fast.data.annotations.write import annotate
from gasp_fast.data.scenes.library import SceneEntry
from gasp_fast.data.tracks.sequences import SequenceConfig


def test_settings_survive_their_json(settings: AnnotationSettings) -> None:
    assert AnnotationSettings.from_json(json.loads(settings.to_json())) == settings


def test_describing_two_million_sequences_is_quick_and_small() -> None:
    entries = tuple(SceneEntry(f"1K/{n:064x}", 350, f"{n:016x}") for n in range(10_000))
    start = time.perf_counter()
    settings = AnnotationSettings(scenes=entries, sequences=SequenceConfig(per_scene=175))
    assert len(settings) == 1_750_000 and settings.shards == 1709
    assert len(settings.to_json()) / len(settings) < 1.2  # bytes of settings per sequence
    settings.sampler.draw(0, 1_749_999)
    assert time.perf_counter() - start < 2
    assert settings.expected_bytes < 15e9


def test_the_expected_size_is_an_upper_bound_and_not_a_loose_one(cache: AnnotationReader) -> None:
    size = sum(shard_path(cache.folder, n).stat().st_size for n in range(cache.settings.shards))
    assert 0.5 * cache.settings.expected_bytes < size - 1100 * cache.settings.shards < cache.settings.expected_bytes


def test_other_settings_are_refused_and_the_difference_named(
    library: Path, settings: AnnotationSettings, cache: AnnotationReader
):
    with pytest.raises(ValueError, match="grid: 8 there, 24 now"):
        next(annotate(library, cache.folder, replace(settings, grid=24)))
    with pytest.raises(ValueError, match="scenes: 3 there, 2 now"):
        next(annotate(library, cache.folder, replace(settings, scenes=settings.scenes[:2])))


def test_another_version_is_refused(settings: AnnotationSettings, tmp_path: Path) -> None:
    store_settings(tmp_path, settings)
    fields = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**fields, "version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        AnnotationReader(tmp_path)


@pytest.mark.parametrize("missing", ["version", "format", "scenes", "sequences", "grid"])
def test_settings_without_a_field_are_named(settings: AnnotationSettings, tmp_path: Path, missing: str) -> None:
    fields = json.loads(settings.to_json())
    del fields[missing]
    (tmp_path / "plan.json").write_text(json.dumps(fields))
    what = "not the settings of gasp-fast tracks" if missing in ("version", "format") else f"fields of .*: {missing}$"
    for use in (AnnotationReader, lambda folder: store_settings(folder, settings)):
        with pytest.raises(ValueError, match=rf"plan\.json: cannot read the settings: .*{what}"):
            use(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, "\xff", '{"format": "gasp-fast tracks", "version": 1, "scenes": 3}']
)
def test_a_damaged_settings_file_is_named_in_one_line(settings: AnnotationSettings, tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"plan\.json: cannot read the settings") as caught:
        store_settings(tmp_path, settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_the_unknown_fields_of_settings_are_named(settings: AnnotationSettings, tmp_path: Path) -> None:
    fields = json.loads(settings.to_json())
    fields["sequences"]["stride"] = 2
    (tmp_path / "plan.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"fields of SequenceConfig: stride$"):
        store_settings(tmp_path, settings)


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, float("nan")])
def test_settings_that_would_keep_no_track_are_refused(settings: AnnotationSettings, keep: float) -> None:
    with pytest.raises(ValueError, match="keep = "):
        replace(settings, keep=keep)


def test_absurd_sizes_are_refused_before_any_work(settings: AnnotationSettings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"grid = 1000000: must lie in 1\.\.1024"):
        replace(settings, grid=1_000_000)
    with pytest.raises(ValueError, match="epochs = 1000000000"):
        replace(settings, epochs=1_000_000_000)
    with pytest.raises(ValueError, match="per_scene = 1000000000"):
        replace(settings.sequences, per_scene=1_000_000_000)
    with pytest.raises(ValueError, match="in 4,500,000 shards: at most 100,000; raise shard_size"):
        store_settings(tmp_path, replace(settings, epochs=1_000_000))


@pytest.mark.parametrize(
    ("key", "value"),
    [("grid", 8.5), ("grid", True), ("epochs", "2"), ("keep", None), ("shard_size", 10**400), ("scenes", {"a": 1})],
)
def test_settings_of_another_type_are_named(settings: AnnotationSettings, tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({**json.loads(settings.to_json()), key: value}))
    with pytest.raises(ValueError, match=rf"plan\.json: cannot read the settings: .*{key} = ") as caught:
        AnnotationReader(tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("key", "value"), [("frames", 10**11), ("frames", -1), ("frames", [[]]), ("name", 3)])
def test_scenes_of_settings_that_cannot_be_sampled_are_named(
    settings: AnnotationSettings, tmp_path: Path, key: str, value: Any
) -> None:
    fields = json.loads(settings.to_json())
    fields["scenes"][1][key] = value
    (tmp_path / "plan.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"plan\.json: cannot read the settings"):
        AnnotationReader(tmp_path)

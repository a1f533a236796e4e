"""The sample at a position of the stream depends on the position alone."""

import json
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest

from gasp_fast.data.annotations.settings import AnnotationSettings, store_settings
from gasp_fast.data.annotations.shard import shard_path
from gasp_fast.data.annotations.write import annotate
from gasp_fast.data.scenes.library import SceneEntry, find_scenes, survey
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.tracks.sequences import SequenceConfig, is_held_out
from gasp_fast.training import sources
from gasp_fast.training.sources import OpenScenes, TrackedScenes
from gasp_fast.training.stream import SampleStream, Share, StreamBatches

SEQUENCES = SequenceConfig(min_frames=3, max_frames=3, window=4, per_scene=4)


def same(one, other):
    frames = all(np.array_equal(a, b) for a, b in zip(one.frames, other.frames, strict=True))
    tracks = all(np.allclose(a.uv, b.uv, atol=1e-3) for a, b in zip(one.tracks, other.tracks, strict=True))
    return frames and tracks and one.messages == other.messages


def test_a_position_gives_the_same_sample_at_any_time_and_in_any_process(config):
    stream = SampleStream(config(mixed=True).data)
    again = pickle.loads(pickle.dumps(stream))
    for position in (17, 3, 17, 0):
        assert same(stream[position], again[position])
        assert stream[position].position == position


def test_scenes_and_questions_alternate_by_weight(config):
    stream = SampleStream(config(mixed=True, qa={"weight": 3.0}).data)
    kinds = [bool(stream[position].tracks) for position in range(24)]
    assert 2 <= sum(kinds) <= 11


def annotated(assets, out, grid):
    entries = tuple(survey(assets.scenes, find_scenes(assets.scenes)))
    settings = AnnotationSettings(scenes=entries, sequences=SEQUENCES, grid=grid, shard_size=5)
    list(annotate(assets.scenes, out, settings))
    return str(out)


def test_annotations_give_the_tracks_of_tracking_on_the_fly(config, assets, tmp_path):
    folders = tuple(annotated(assets, tmp_path / str(grid), grid) for grid in (4, 8))
    ready = SampleStream(config(scenes={"annotations": folders}).data)
    on_the_fly = SampleStream(config(scenes={"grids": (4, 8)}).data)
    for position in range(6):
        assert len(ready[position].tracks) == 2 and same(ready[position], on_the_fly[position])


def test_annotations_of_different_sequences_cannot_be_combined(config, assets, tmp_path):
    first = annotated(assets, tmp_path / "a", 4)
    entries = tuple(survey(assets.scenes, find_scenes(assets.scenes)))
    other = AnnotationSettings(scenes=entries, sequences=replace(SEQUENCES, seed=1), grid=8)
    list(annotate(assets.scenes, tmp_path / "b", other))
    with pytest.raises(ValueError, match="annotates other sequences"):
        TrackedScenes(config(scenes={"annotations": (first, str(tmp_path / "b"))}).data.scenes)


def recorded_scenes(monkeypatch):
    """The names of the scenes that are opened from now on."""
    opened = []
    monkeypatch.setattr(sources, "open_scene", lambda path: opened.append(path.name) or open_scene(path))
    return opened


def test_held_out_scenes_are_never_drawn(config, assets, monkeypatch):
    names = find_scenes(assets.scenes)
    share = next(n / 20 for n in range(20) if 0 < sum(is_held_out(name, n / 20) for name in names) < len(names))
    scenes = TrackedScenes(config(scenes={"held_out": share}).data.scenes)
    opened = recorded_scenes(monkeypatch)
    for index in range(len(scenes)):
        scenes.sample(0, index, 0)
    assert set(opened) == {name for name in names if not is_held_out(name, share)}
    with pytest.raises(ValueError, match="leaves none of 4 scenes"):
        TrackedScenes(config(scenes={"held_out": 1.0}).data.scenes)


def test_a_broken_scene_is_skipped_and_named(config, assets, tmp_path, capsys):
    library = tmp_path / "library"
    shutil.copytree(assets.scenes, library)
    scenes = TrackedScenes(config(scenes={"root": str(library)}).data.scenes)
    for image in (library / "scene-1" / "color").iterdir():
        image.write_bytes(b"")
    assert scenes.sample(0, 4, 0).tracks  # sequences 4..7 are of scene-1
    assert list(scenes.broken) == ["scene-1"] and "scene-1" in capsys.readouterr().err


def test_skipped_scenes_records_and_videos_are_named_with_their_file(config, assets, tmp_path, capsys):
    library, questions = tmp_path / "library", tmp_path / "questions"
    shutil.copytree(assets.scenes, library)
    shutil.copytree(assets.questions, questions)
    (library / "scene-2" / "meta.json").write_text("{")
    records = json.loads((questions / "qa.json").read_text())
    records[1]["conversations"][0]["value"] += "<|image_pad|>"
    (questions / "qa.json").write_text(json.dumps(records))
    (questions / records[0]["video"]).write_bytes(b"")
    settings = config(mixed=True, scenes={"root": str(library)}, qa={"root": str(questions)})
    stream = SampleStream(settings.data)
    scenes, records_read = capsys.readouterr().err.splitlines()
    assert scenes.startswith(f"{library}: skipped 1 of 4 scenes; the first, scene-2: ")
    assert records_read.startswith(f"{questions}: skipped 1 of {len(records)} records; the first, qa.json[1]: ")
    assert "<|image_pad|>" in records_read
    stream.sources["qa"].sample(0, 0, 0)
    assert f"{questions}: skipped qa.json[0]: {questions / records[0]['video']}: " in capsys.readouterr().err
    named = {stream.describe(position).partition(", ")[2] for position in range(40)}
    assert {"qa.json[0]", "qa.json[2]", "scene-0, sequence 0"} <= named and "qa.json[1]" not in named


def annotated_copy(config, assets, tmp_path, per_scene=4):
    """A copy of the library, which the test may damage, with its annotations; and the source of its sequences."""
    library = tmp_path / "library"
    shutil.copytree(assets.scenes, library)
    entries = tuple(survey(library, find_scenes(library)))
    sequences = replace(SEQUENCES, per_scene=per_scene)
    settings = AnnotationSettings(scenes=entries, sequences=sequences, grid=8, shard_size=5)
    list(annotate(library, tmp_path / "tracks", settings))
    chosen = {"root": str(library), "annotations": (str(tmp_path / "tracks"),)}
    return library, lambda: TrackedScenes(config(scenes=chosen).data.scenes)


def swap_poses(library):
    first, second = sorted((library / "scene-1" / "pose").iterdir())[:2]
    texts = first.read_text(), second.read_text()
    second.write_text(texts[0])
    first.write_text(texts[1])


def delete_a_pose(library):
    sorted((library / "scene-1" / "pose").iterdir())[-1].unlink()


def break_the_meta(library):
    (library / "scene-1" / "meta.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(swap_poses, "other names or poses"), (delete_a_pose, "9 frames instead of 10"), (break_the_meta, "not JSON")],
)
@pytest.mark.parametrize("ready", [True, False], ids=["annotated", "tracked on the fly"])
def test_a_scene_that_changed_after_its_annotation_is_replaced_and_named(
    config, assets, tmp_path, capsys, damage, reason, ready
):
    library, scenes = annotated_copy(config, assets, tmp_path)
    if not ready:
        scenes = TrackedScenes(config(scenes={"root": str(library)}).data.scenes)
    damage(library)
    scenes = scenes() if ready else scenes
    drawn = [scenes.sample(0, index, 0) for index in range(len(scenes))]
    assert all(sample.tracks for sample in drawn)
    assert list(scenes.broken) == ["scene-1"] and reason in scenes.broken["scene-1"]
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1 and printed[0].startswith("data.scenes: scene-1: ") and reason in printed[0]


def test_one_broken_scene_of_many_sequences_does_not_end_the_run(config, assets, tmp_path):
    library, scenes = annotated_copy(config, assets, tmp_path, per_scene=200)
    swap_poses(library)
    scenes = scenes()
    again = pickle.loads(pickle.dumps(scenes))
    for index in (200, 399):
        assert same(scenes.sample(0, index, 0), again.sample(0, index, 0))  # the sample in its place is always the same
    assert list(scenes.broken) == ["scene-1"]


def test_a_damaged_shard_is_never_trained_on(config, assets, tmp_path):
    _, scenes = annotated_copy(config, assets, tmp_path)
    path = tmp_path / "tracks" / "tracks-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-200] ^= 4
    path.write_bytes(content)
    scenes = scenes()
    for index in range(len(scenes)):
        assert scenes.sample(0, index, 0).tracks
    assert scenes.broken and all("tracks-00001.safetensors: damaged" in reason for reason in scenes.broken.values())
    path.unlink()
    with pytest.raises(OSError, match="shard 1 of 4 is missing; finish with gasp-fast tracks"):
        TrackedScenes(scenes.config)


def test_ten_thousand_annotated_scenes_are_not_touched_at_the_start(config, tmp_path, monkeypatch):
    entries = tuple(SceneEntry(f"1K/{n:05d}", 300, f"{n:016x}") for n in range(10_000))
    settings = AnnotationSettings(scenes=entries, sequences=replace(SEQUENCES, per_scene=1), shard_size=5_000)
    store_settings(tmp_path, settings)
    for number in range(settings.shards):
        shard_path(tmp_path, number).touch()
    calls = []
    for name in ("stat", "lstat", "scandir", "listdir"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _call=call, **k: (calls.append(a), _call(*a, **k))[1])
    source = {"root": str(tmp_path / "library"), "annotations": (str(tmp_path),)}
    assert len(TrackedScenes(config(scenes=source).data.scenes)) == 10_000
    assert len(calls) < 100


@pytest.mark.parametrize(("bound", "open_at_once"), [(10_000, 4), (2.5, 2), (0.5, 1)])  # in lengths of a scene
def test_scenes_stay_open_up_to_a_number_of_frames(assets, monkeypatch, bound, open_at_once):
    opened = recorded_scenes(monkeypatch)
    names = find_scenes(assets.scenes)
    scenes = OpenScenes(assets.scenes, frames=bound * len(open_scene(assets.scenes / names[0])))
    for name in names * 2:
        assert scenes[name].root.name == name and len(scenes) <= open_at_once
    assert len(scenes) == open_at_once
    assert len(opened) == (4 if open_at_once == 4 else 8)


def test_a_library_without_a_readable_scene_is_an_error(config, assets, tmp_path):
    library = tmp_path / "library"
    shutil.copytree(assets.scenes, library)
    scenes = TrackedScenes(config(scenes={"root": str(library)}).data.scenes)
    for image in library.rglob("color/*"):
        image.write_bytes(b"")
    with pytest.raises(OSError, match="no readable sequence"):
        scenes.sample(0, 0, 0)


def test_epochs_are_passes_through_the_scenes(config):
    settings = config(train={"steps": None, "epochs": 2.0, "batch_size": 4})
    stream = SampleStream(settings.data)
    assert settings.train.steps_of(stream.epoch) == 2 * 16 // 4
    drawn = [stream.mixture.draw(position) for position in range(32)]
    assert sorted(d.index for d in drawn[:16]) == sorted(d.index for d in drawn[16:]) == list(range(16))


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_a_step_has_the_same_positions_however_it_is_divided(world_size, micro):
    shares = [Share(rank, world_size, 8, micro) for rank in range(world_size)]
    steps = [list(StreamBatches(share, 3)) for share in shares]
    for step in range(3):
        once = 8 // (world_size * micro)
        seen = [p for batches in steps for batch in batches[step * once : (step + 1) * once] for p in batch]
        assert sorted(seen) == list(range(8 * step, 8 * step + 8))


def test_a_resumed_run_loads_the_steps_that_are_left():
    share = Share(1, 2, 8, 2)
    assert list(StreamBatches(share, 5, done=3)) == list(StreamBatches(share, 5))[3 * share.accumulation :]


def test_loader_processes_load_the_same_batches(config):
    from gasp_fast.backbones import load_backbone
    from gasp_fast.training.stream import make_loader

    settings = config(mixed=True)
    backbone = load_backbone(settings.model.source)
    stream, share = SampleStream(settings.data), Share(0, 1, 1, 1)
    batches = [list(make_loader(replace(settings.data, workers=n), stream, backbone, share, 3, False)) for n in (0, 1)]
    for one, other in zip(*batches, strict=True):
        assert one.keys() == other.keys() and (one["input_ids"] == other["input_ids"]).all()
        assert (one["matches"].target == other["matches"].target).all()

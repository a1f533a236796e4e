"""The sample at a position of the stream depends on the position alone."""

import json
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest

from gasp_fast.data.annotations.settings import AnnotationSettings, store_settings
from gasp_fast.data.annotations.shard import shard_arrays, shard_bytes, shard_path
from gasp_fast.data.annotations.write import annotate
from gasp_fast.data.permutation import permuted
from gasp_fast.data.scenes import open_scenes
from gasp_fast.data.scenes.library import SceneEntry, find_scenes, survey
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.open_scenes import FRAME_BYTES, OpenScenes
from gasp_fast.data.tracks.build import Tracks
from gasp_fast.data.tracks.sequences import SequenceConfig, is_held_out
from gasp_fast.training.guards import check_left_out
from gasp_fast.training.sources import TrackedScenes
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


@pytest.mark.parametrize("stored", [False, True], ids=["tracked", "annotated"])
def test_the_frames_of_a_sequence_can_come_in_temporal_order(config, assets, tmp_path, stored):
    source = {"annotations": (str(annotated(assets, tmp_path / "tracks", 8)),)} if stored else {"sequences": SEQUENCES}
    streams = [
        SampleStream(config(scenes={**source, "order": order}).data) for order in ("anchor_first", "chronological")
    ]
    anchors = set()
    for position in range(8):
        first, ordered = (stream[position].tracks[0] for stream in streams)
        assert first.query_frame == 0 and sorted(first.frames) == list(ordered.frames)
        assert ordered.frames[ordered.query_frame] == first.frames[0]
        assert np.allclose(ordered.uv[:, ordered.query_frame], ordered.query, atol=1e-3)
        anchors.add(ordered.query_frame)
    assert len(anchors) > 1


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
    monkeypatch.setattr(open_scenes, "open_scene", lambda path: opened.append(path.name) or open_scene(path))
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


def reasons(samples):
    """What was skipped for these samples, by record."""
    return {one.record: one.reason for sample in samples for one in sample.skipped}


def test_a_broken_scene_is_replaced_and_named(config, assets, tmp_path):
    library = tmp_path / "library"
    shutil.copytree(assets.scenes, library)
    scenes = TrackedScenes(config(scenes={"root": str(library)}).data.scenes)
    for image in (library / "scene-1" / "color").iterdir():
        image.write_bytes(b"")
    sample = scenes.sample(0, 4, 17)  # sequences 4..7 are of scene-1
    assert sample.tracks and sample.index not in range(4, 8)
    first = sample.skipped[0]
    assert (first.kind, first.record, first.position) == ("scene", f"{library}/scene-1, sequence 0", 17)
    assert f"{library}/scene-1/color/" in first.reason
    again = pickle.loads(pickle.dumps(scenes)).sample(0, 4, 17)
    assert same(sample, again) and sample.skipped == again.skipped


def test_scenes_and_records_that_cannot_be_used_are_named_with_their_file(config, assets, tmp_path):
    library, questions = tmp_path / "library", tmp_path / "questions"
    shutil.copytree(assets.scenes, library)
    shutil.copytree(assets.questions, questions)
    (library / "scene-2" / "meta.json").write_text("{")
    records = json.loads((questions / "qa.json").read_text())
    records[1]["conversations"][0]["value"] += "<|image_pad|>"
    (questions / "qa.json").write_text(json.dumps(records))
    (questions / records[0]["video"]).write_bytes(b"")
    settings = config(
        mixed=True, scenes={"root": str(library)}, qa={"root": str(questions)}, run={"max_skipped": 0.25}
    )  # fmt: skip
    stream = SampleStream(settings.data)
    assert [(one.kind, one.record, one.position) for one in stream.left_out] == [
        ("scene", f"{library}/scene-2", None), ("question", f"{questions}/qa.json[1]", None)
    ]  # fmt: skip
    assert "<|image_pad|>" in stream.left_out[1].reason
    lines = check_left_out(settings.run, stream)
    assert lines[0].startswith(f"data.scenes: 1 of 4 cannot be used; the first, scene {library}/scene-2: ")
    assert lines[1].startswith(f"data.qa: 1 of {len(records)} cannot be used; the first, question {questions}/qa.json")
    (video,) = stream.sources["qa"].sample(0, 0, 5).skipped
    assert (video.kind, video.record) == ("video", f"{questions}/qa.json[0]")
    assert str(questions / records[0]["video"]) in video.reason
    named = {stream.describe(position).partition(", ")[2] for position in range(40)}
    assert {"qa.json[0]", "qa.json[2]", "scene-0, sequence 0"} <= named and "qa.json[1]" not in named


def test_questions_without_any_readable_video_are_an_error(config, assets, tmp_path):
    questions = tmp_path / "questions"
    shutil.copytree(assets.questions, questions)
    source = SampleStream(config(mixed=True, qa={"root": str(questions)}).data).sources["qa"]
    for video in questions.rglob("*.mp4"):
        video.unlink()
    with pytest.raises(
        OSError, match=r"none of \d+ samples can be used; the last, video .*no such file; are the archives"
    ):
        source.sample(0, 0, 0)


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
    [
        (swap_poses, "other names, poses or cameras"),
        (delete_a_pose, "9 frames instead of 10"),
        (break_the_meta, "not JSON"),
    ],
)
@pytest.mark.parametrize("ready", [True, False], ids=["annotated", "tracked on the fly"])
def test_a_scene_that_changed_after_its_annotation_is_replaced_and_named(
    config, assets, tmp_path, damage, reason, ready
):
    library, scenes = annotated_copy(config, assets, tmp_path)
    if not ready:
        scenes = TrackedScenes(config(scenes={"root": str(library)}).data.scenes)
    damage(library)
    scenes = scenes() if ready else scenes
    drawn = [scenes.sample(0, index, 0) for index in range(len(scenes))]
    assert all(sample.tracks for sample in drawn)
    assert reasons(drawn).keys() == {f"{library}/scene-1, sequence {place}" for place in range(4)}
    assert all(reason in text for text in reasons(drawn).values())


def test_one_broken_scene_of_many_sequences_does_not_end_the_run(config, assets, tmp_path):
    library, scenes = annotated_copy(config, assets, tmp_path, per_scene=200)
    swap_poses(library)
    scenes = scenes()
    again = pickle.loads(pickle.dumps(scenes))
    for index in (200, 399):
        one, other = scenes.sample(0, index, 0), again.sample(0, index, 0)
        assert same(one, other)  # the sample in its place is always the same
        assert one.skipped and all("/scene-1, sequence" in record for record in reasons([one]))


def test_a_damaged_shard_is_never_trained_on(config, assets, tmp_path):
    _, scenes = annotated_copy(config, assets, tmp_path)
    path = tmp_path / "tracks" / "tracks-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-200] ^= 4
    path.write_bytes(content)
    scenes = scenes()
    drawn = [scenes.sample(0, index, 0) for index in range(len(scenes))]
    assert all(sample.tracks for sample in drawn)
    assert len(reasons(drawn)) == 5 and all(f"{path}: damaged" in reason for reason in reasons(drawn).values())
    path.unlink()
    with pytest.raises(OSError, match="shard 1 of 4 is missing; finish with gasp-fast tracks"):
        TrackedScenes(scenes.config)


def test_what_annotations_leave_out_is_said_at_the_start(config, assets, tmp_path):
    library, folder = tmp_path / "library", tmp_path / "tracks"
    shutil.copytree(assets.scenes, library)
    entries = tuple(survey(library, find_scenes(library)))
    settings = AnnotationSettings(scenes=entries[:2], sequences=SEQUENCES, grid=8, shard_size=5)
    for image in (library / "scene-1" / "depth").iterdir():
        image.write_bytes(b"")
    left_out = {entry.name: "no depth" for entry in entries[2:]}
    store_settings(folder, settings, left_out)
    list(annotate(library, folder, settings))
    settings = config(scenes={"root": str(library), "annotations": (str(folder),)})
    scenes, sequences = check_left_out(settings.run, SampleStream(settings.data))
    assert scenes == f"{folder}: without 2 of 4 scenes; the first, scene-2: no depth"
    assert sequences.startswith(f"{folder}: no tracks for 4 of 8 sequences; the first, scene-1/depth/")


def test_ten_thousand_annotated_scenes_are_not_touched_at_the_start(config, tmp_path, monkeypatch):
    entries = tuple(SceneEntry(f"1K/{n:05d}", 300, f"{n:016x}") for n in range(10_000))
    settings = AnnotationSettings(scenes=entries, sequences=replace(SEQUENCES, per_scene=1), shard_size=5_000)
    store_settings(tmp_path, settings)
    none = shard_arrays(range(5_000), [Tracks(*np.zeros((5, 0, 2)))] * 5_000)
    for number in range(settings.shards):
        shard_path(tmp_path, number).write_bytes(shard_bytes(none, settings.digest, {}))
    calls = []
    for name in ("stat", "lstat", "scandir", "listdir", "open"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _call=call, **k: (calls.append(a), _call(*a, **k))[1])
    source = {"root": str(tmp_path / "library"), "annotations": (str(tmp_path),)}
    assert len(TrackedScenes(config(scenes=source).data.scenes)) == 10_000
    assert len(calls) < 100


@pytest.mark.parametrize(("bound", "open_at_once"), [(10_000, 4), (2.5, 2), (0.5, 1)])  # in lengths of a scene
def test_scenes_stay_open_up_to_a_number_of_bytes(assets, monkeypatch, bound, open_at_once):
    opened = recorded_scenes(monkeypatch)
    names = find_scenes(assets.scenes)
    scenes = OpenScenes(assets.scenes, limit_bytes=bound * len(open_scene(assets.scenes / names[0])) * FRAME_BYTES)
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
    with pytest.raises(OSError, match=r"none of 16 samples can be used; the last, scene .*/color/"):
        scenes.sample(0, 0, 0)


def test_epochs_are_passes_through_the_scenes(config):
    settings = config(train={"steps": None, "epochs": 2.0, "batch_size": 4})
    stream = SampleStream(settings.data)
    assert settings.train.steps_of(stream.epoch) == 2 * 16 // 4
    drawn = [stream.mixture.draw(position) for position in range(32)]
    assert sorted(d.index for d in drawn[:16]) == sorted(d.index for d in drawn[16:]) == list(range(16))


def records_of(stream, source, epochs=1):
    """The videos' names that `source` would draw in so many epochs, by epoch."""
    length = len(stream.sources[source])
    return [
        [stream.sources[source].name(permuted(n, length, f"mixture/0/{source}/{epoch}")) for n in range(length)]
        for epoch in range(epochs)
    ]


def test_a_limit_draws_from_a_fixed_random_subset_of_the_questions(config):
    def stream(**qa):
        return SampleStream(config(mixed=True, qa=qa).data)

    [everything] = records_of(stream(), "qa")
    first, again, other = (stream(limit=5, seed=seed) for seed in (0, 0, 1))
    one, two = records_of(first, "qa", epochs=2)
    assert len(first.sources["qa"]) == 5 and len(set(one)) == 5 and set(one) < set(everything)
    assert set(two) == set(one) and two != one  # an epoch draws each once, in another order
    assert records_of(again, "qa", epochs=2) == records_of(pickle.loads(pickle.dumps(first)), "qa", 2) == [one, two]
    assert {*records_of(other, "qa")[0]} != {*one}
    subsets = [{*records_of(stream(limit=5, seed=seed), "qa")[0]} for seed in range(40)]
    assert set.union(*subsets) == set(everything)  # none is out of reach
    assert first.sources["qa"].fingerprint() == again.sources["qa"].fingerprint() != other.sources["qa"].fingerprint()


def test_a_limited_question_is_outlined_read_and_named_as_one_record(config):
    questions = SampleStream(config(mixed=True, qa={"limit": 4, "seed": 2}).data).sources["qa"]
    numbers = [permuted(index, len(questions.records), "limit/2") for index in range(4)]
    for index, number in enumerate(numbers):
        turns = tuple(turn.text for turn in questions.records.record(number).turns)
        assert questions.outline(0, index).texts == turns and questions.name(index) == questions.records.name(number)
        sample, expected = questions.load(0, index, 0), questions.records.sample(number, 2)
        assert np.array_equal(np.stack(sample.frames), expected.frames)
        assert questions.frame_size_of(index) == sample.frames[0].shape[1::-1]


def test_more_questions_than_there_are_cannot_be_drawn(config, assets):
    with pytest.raises(
        ValueError, match=r"data\.qa\.limit = 9999 is more than the \d+ usable questions in .*; lower it"
    ):
        SampleStream(config(mixed=True, qa={"limit": 9999}).data)


def test_scenes_that_are_only_counted_give_the_steps_and_no_sample(config):
    gasp, other = config(mixed=True, qa={"weight": 0.25}), {"steps": None, "epochs": 2.0, "batch_size": 4}
    counted = config(mixed=True, qa={"weight": 0.25}, scenes={"only_counted": True}).data
    questions = replace(counted, vqa=replace(counted.qa, weight=1.0))
    streams = [SampleStream(data) for data in (gasp.data, counted, questions)]
    assert [list(stream.sources) for stream in streams] == [["scenes", "qa"], ["qa"], ["qa", "vqa"]]
    train = config(train=other).train
    assert len({train.steps_of(stream.epoch) for stream in streams}) == 1
    assert streams[0].epoch == 1000 and not any(streams[2][position].tracks for position in range(20))
    longer = replace(counted.scenes, sequences=replace(SEQUENCES, per_scene=400))
    assert SampleStream(replace(counted, scenes=longer)).epoch == 2 * streams[1].epoch


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
    from gasp_fast.training.loader import make_loader

    settings = config(mixed=True)
    backbone = load_backbone(settings.model.source)
    stream, share = SampleStream(settings.data), Share(0, 1, 1, 1)
    batches = [list(make_loader(replace(settings.data, workers=n), stream, backbone, share, 3, False)) for n in (0, 1)]
    for one, other in zip(*batches, strict=True):
        assert one.keys() == other.keys() and (one["input_ids"] == other["input_ids"]).all()
        assert (one["matches"].target == other["matches"].target).all()

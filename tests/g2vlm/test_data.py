"""Packs of sequences of scenes: their truth, their order, and what happens to what cannot be read."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.box_world import BoxWorld
from support.many_scenes import KINDS, write_library
from support.recorded import recorded_scene

from gasp_fast.backbones import load_backbone
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.g2vlm.collator import GeometryCollator
from gasp_fast.g2vlm.crop import unprojected
from gasp_fast.g2vlm.data_config import G2DataConfig, shape_of_step
from gasp_fast.g2vlm.losses import geometry_loss
from gasp_fast.g2vlm.objective import G2Collator, packs_of
from gasp_fast.g2vlm.question_samples import QuestionStream
from gasp_fast.g2vlm.samples import GeometryStream, UnseenSequences, draw_frames, geometry_sample
from gasp_fast.training.loader import LoadedBatches, make_data_loader
from gasp_fast.training.stream import Share


@pytest.fixture
def rooms(assets):
    """A configuration of small packs of rendered rooms."""

    def make(**changed):
        small = {"min_frames": 2, "max_frames": 5, "max_gap": 3, "side": 56, "min_aspect": 0.6, "max_aspect": 1.8}
        fields = {"roots": (str(assets.scenes),), "per_scene": 4, "workers": 0, **small, **changed}
        return G2DataConfig(**fields)

    return make


def loader_of(stream, at_once, steps, done=0, rank=0, world_size=1, workers=0, backbone=None):
    """Packs of at most `at_once` patches."""
    deal = packs_of(stream.shape_of_step, stream.batch_size, at_once, world_size)
    share = Share(rank, world_size, stream.batch_size, tokens_at_once=at_once, deal=deal)
    return make_data_loader(stream, G2Collator(backbone), share, steps, done, workers, pin_memory=False)


def packs(config, batch_size=4, steps=3, done=0, rank=0, world_size=1, workers=0):
    stream = GeometryStream(config, batch_size)
    return [batch["pack"] for batch in loader_of(stream, 60, steps, done, rank, world_size, workers)]


def tensors(batch):
    true = [getattr(batch.true, field.name) for field in fields(batch.true)]
    return [batch.images, *true, batch.valid, batch.with_normals]


def assert_same_sequences(one, other):
    """Of two lists of batches, in any division into packs."""
    rows = [[row for batch in side for row in zip(*tensors(batch), strict=True)] for side in (one, other)]
    assert len(rows[0]) == len(rows[1]) > 0
    for ours, theirs in zip(*rows, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def agreement(sample, tolerance):
    """The share of the known points of each frame that other frames confirm, of those that fall into their images.

    A point behind what the other frame sees is hidden there, and says nothing.
    """
    points, confirmed = unprojected(sample.depth, sample.intrinsics), []
    height, width = sample.depth.shape[1:]
    for i in range(len(points)):
        known = points[i][sample.depth[i] > 0]
        for j in range(len(points)):
            there = (known @ sample.pose[i, :3, :3].T + sample.pose[i, :3, 3] - sample.pose[j, :3, 3]) @ sample.pose[
                j, :3, :3
            ]
            there = there[there[:, 2] > 1e-6]
            seen = there @ sample.intrinsics[j].T
            column, row = np.floor(seen[:, :2] / seen[:, 2:]).astype(int).T
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            depth, z = sample.depth[j][row[inside], column[inside]], there[inside, 2]
            visible = (depth > 0) & (z < depth * (1 + 2 * tolerance))
            confirmed.append(np.abs(z - depth)[visible] < tolerance * depth[visible])
    return np.concatenate(confirmed).mean()


def test_points_of_a_frame_lie_where_other_frames_see_them(tmp_path):
    """In a room whose depth is exact, but for pixels at edges, where the nearest depth is another surface's."""
    scene = open_scene(BoxWorld(frames=6).write_rgbd(tmp_path / "room"))
    sample = geometry_sample(scene, (4, 1, 5), (112, 98), (0.6, 0.2))
    assert agreement(sample, 0.01) > 0.98


@pytest.mark.parametrize(("name", "share"), [("hololens_dvmvs_a", 0.97), ("apc_shelf_glue", 0.96)])
def test_recorded_frames_agree_with_each_other(name, share):
    sample = geometry_sample(open_scene(recorded_scene(name)), (10, 14, 18), (140, 210), (0.0, 0.5))
    assert agreement(sample, 0.05) > share


def test_truth_is_in_the_cameras_of_each_frame_and_of_the_first(rooms, assets):
    for batch in packs(rooms()):
        count, frames, _, height, width = batch.images.shape
        assert batch.true.local.shape == batch.true.world.shape == (count, frames, height, width, 3)
        assert height % 14 == width % 14 == 0 and batch.valid.shape == (count, frames, height, width)
        assert batch.valid.float().mean() > 0.99
        torch.testing.assert_close(batch.true.world[:, 0], batch.true.local[:, 0], rtol=0, atol=0)
        turned = torch.einsum("bfij,bfhwj->bfhwi", batch.true.rotation, batch.true.local)
        torch.testing.assert_close(turned + batch.true.translation[:, :, None, None], batch.true.world)
        identity = torch.eye(3).expand(count, frames, 3, 3)
        torch.testing.assert_close(batch.true.rotation @ batch.true.rotation.mT, identity)
        loss = geometry_loss(batch.true, batch.true, batch.valid, backend="torch")
        assert loss.local.max() < 1e-5 and loss.rotation.max() < 1e-3
        assert batch.images.min() > -2.2 and batch.images.max() < 2.7


def test_all_sequences_of_a_step_have_one_shape_and_steps_differ(rooms):
    config, by_step = rooms(), []
    for step in range(4):
        (batch, *_) = packs(config, batch_size=2, steps=step + 1, done=step)
        by_step.append(tuple(batch.images.shape[1:]))
        shape = shape_of_step(config, step)
        assert by_step[-1] == (shape.frames, 3, shape.height, shape.width)
    drawn = [shape_of_step(config, step) for step in range(200)]
    assert {shape.frames for shape in drawn} == {2, 3, 4, 5} and len({shape.width for shape in drawn}) > 2
    assert all(0.55 < shape.width / shape.height < 2 for shape in drawn)


def test_samples_are_the_same_on_two_processes_with_workers_and_after_a_resume(rooms):
    config = rooms()
    one = packs(config)
    parts = [packs(config, rank=rank, world_size=2) for rank in range(2)]
    by_step = [[packs(config, steps=n + 1, done=n, rank=rank, world_size=2) for rank in range(2)] for n in range(3)]
    assert [len(part) for part in parts] == [sum(len(step[rank]) for step in by_step) for rank in range(2)]
    assert_same_sequences(one, [batch for step in by_step for part in step for batch in part])
    assert_same_sequences(packs(config, steps=3, done=2), packs(config)[-len(packs(config, steps=3, done=2)) :])
    assert_same_sequences(one, packs(rooms(workers=2), workers=2))


def test_a_pack_has_as_many_tokens_as_fit(rooms):
    config = rooms()
    sizes = [batch.images.shape[:2] for batch in packs(config, batch_size=4, steps=8)]
    assert {count for count, _ in sizes} > {1} and sum(count for count, _ in sizes) == 32
    for batch in packs(config, batch_size=4, steps=8):
        assert batch.images.shape[0] == 1 or batch.valid.numel() / 196 <= 60


def test_a_broken_depth_file_is_replaced_and_named(rooms, assets, tmp_path):
    library = tmp_path / "scenes"
    shutil.copytree(assets.scenes, library)
    for file in (library / "scene-1" / "depth").iterdir():
        file.write_bytes(b"no image")
    config = rooms(roots=(str(library),))
    stream = GeometryStream(config, 4)
    with LoadedBatches(loader_of(stream, 60, steps=4), stream, 60) as loaded:
        batches = [batch["pack"] for batch in loaded]
        _, skipped = loaded.take()
    assert skipped and all("scene-1, sequence" in one.record and "depth" in one.reason for one in skipped)
    assert sum(len(batch.images) for batch in batches) == 16


def test_unknown_and_far_depth_is_not_valid_and_a_frame_may_know_none(rooms, assets, tmp_path):
    scene = tmp_path / "scene"
    shutil.copytree(assets.scenes / "scene-0", scene)
    (scene / "depth" / "000003.png").unlink()
    plain = geometry_sample(open_scene(scene), (2, 3, 4), (56, 56))
    limit = float(np.median(plain.depth[0]))
    near = geometry_sample(open_scene(scene), (2, 3, 4), (56, 56), max_depth=limit)
    batch = GeometryCollator()([near])
    assert not batch.valid[0, 1].any() and batch.valid[0, 0].float().mean() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(batch.valid[0, 2], torch.from_numpy((plain.depth[2] > 0) & (plain.depth[2] <= limit)))
    loss = geometry_loss(batch.true, batch.true, batch.valid, backend="torch")
    assert torch.isfinite(loss.total()).all()


def test_frames_have_gaps_within_the_range_and_every_frame_can_be_drawn():
    config, rng = G2DataConfig(min_gap=2, max_gap=4), np.random.default_rng(0)
    drawn = [draw_frames(config, 20, 4, rng.random) for _ in range(400)]
    gaps = [b - a for frames in drawn for a, b in pairwise(frames)]
    assert set(gaps) == {2, 3, 4} and {frame for frames in drawn for frame in frames} == set(range(20))
    assert draw_frames(config, 5, 5, rng.random) == (0, 1, 2, 3, 4)  # a short scene has smaller gaps


def test_short_and_held_out_scenes_are_left_out_and_named(rooms, assets):
    with pytest.raises(ValueError, match=r"10 frames, fewer than data.max_frames = 11"):
        GeometryStream(rooms(max_frames=11), 2)
    trained = {entry.name for entry in GeometryStream(rooms(held_out=0.3), 2).sources["0"].entries}
    unseen = UnseenSequences(str(assets.scenes), frames=3, stride=2, per_scene=2, side=56, held_out=0.3)
    evaluated = {name for name, _ in unseen.sequences}
    assert trained and evaluated and trained | evaluated == {f"scene-{n}" for n in range(4)}
    assert not trained & evaluated


def test_evaluation_reads_the_same_sequences_every_time(assets):
    unseen = UnseenSequences(str(assets.scenes), frames=3, stride=2, per_scene=2, side=56)
    assert [frames for _, frames in unseen.sequences[:2]] == [(0, 2, 4), (5, 7, 9)] and len(unseen) == 8
    again = UnseenSequences(str(assets.scenes), frames=3, stride=2, per_scene=2, side=56)
    assert_same_sequences([GeometryCollator()([unseen[5]])], [GeometryCollator()([again[5]])])


def test_roots_are_mixed_by_weight_and_say_whether_they_have_normals(rooms, assets):
    config = rooms(roots=(str(assets.scenes),) * 2, weights=(3.0, 1.0), with_normals=(True, False))
    flags = torch.cat([batch.with_normals for batch in packs(config, steps=30)])
    assert 0.6 < flags.float().mean() < 0.9


def test_jitter_changes_colours_and_nothing_else(rooms):
    plain, changed = packs(rooms(), steps=1)[0], packs(rooms(jitter=0.3), steps=1)[0]
    assert (plain.images - changed.images).abs().mean() > 0.05
    assert torch.equal(plain.true.local, changed.true.local)


def question_packs(config, backbone, steps=4, done=0):
    stream = QuestionStream(config, 4)
    return [batch["pack"] for batch in loader_of(stream, 200, steps, done, backbone=backbone)]


def test_a_pack_of_the_joint_stage_has_questions_about_its_own_frames(rooms, assets, questions):
    backbone = load_backbone(assets.models["qwen2_vl"])
    batches, tokenizer = question_packs(rooms(questions=str(questions)), backbone), backbone.processor.tokenizer
    assert {batch.images.shape[:2] for batch in batches} == {(4, 2), (4, 3)}
    for batch in batches:
        count, frames = batch.images.shape[:2]
        assert batch.questions.input_ids.shape == batch.questions.labels.shape == batch.questions.attention_mask.shape
        assert len(batch.questions.image_grid_thw) == count * frames
        assert len(batch.questions.pixel_values) == batch.questions.image_grid_thw.prod(1).sum()
        for ids, labels, mask in zip(
            batch.questions.input_ids, batch.questions.labels, batch.questions.attention_mask, strict=True
        ):
            answer = tokenizer.decode(labels[labels != -100])
            number = tokenizer.decode(ids[mask.bool()]).count("Count well.")
            assert answer.startswith(f"There are {number}.")
            assert (mask.diff() <= 0).all() and (labels[mask == 0] == -100).all()  # padded on the right
    resumed = question_packs(rooms(questions=str(questions)), backbone, done=2)
    assert_same_sequences(resumed, batches[-len(resumed) :])


def test_questions_that_cannot_be_used_are_replaced_and_named(rooms, questions, tmp_path):
    """One whose scene has changed since, found when it is read, and one with a token that ends its turn."""
    records = json.loads((questions / "records.json").read_text())
    records[1]["images"]["digest"] = "0" * 20
    records[2]["conversations"][1]["value"] += "<|im_end|>"
    (tmp_path / "records.json").write_text(json.dumps(records))
    stream = QuestionStream(rooms(questions=str(tmp_path)), 4)
    skipped = {one.record: one.reason for position in range(32) for one in stream[position].skipped}
    assert list(skipped) == [f"{tmp_path}/records.json[1]"] and "has changed" in skipped[f"{tmp_path}/records.json[1]"]
    assert [one.record for one in stream.left_out] == [f"{tmp_path}/records.json[2]"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_the_same_from_every_format(kind, tmp_path):
    """Of one scene, written in each; formats without depth have it computed, or are left out by name."""
    write_library(kind, tmp_path / "library", 1, 6)
    write_library("rgbd", tmp_path / "as rgbd", 1, 6)
    scene = open_scene(tmp_path / "library" / "scene-0000")
    if not scene.has_depth:
        with pytest.raises(ValueError, match=r"depth"):
            UnseenSequences(str(tmp_path / "library"), 3, side=28)
        return
    ours, rgbd = (UnseenSequences(str(tmp_path / name), 3, side=28)[0] for name in ("library", "as rgbd"))
    np.testing.assert_allclose(ours.pose, rgbd.pose, atol=1e-4)
    np.testing.assert_allclose(ours.intrinsics, rgbd.intrinsics, rtol=1e-3)
    both = (ours.depth > 0) & (rgbd.depth > 0)
    assert both.mean() > 0.5
    close = np.abs(ours.depth - rgbd.depth)[both] < 0.02 * rgbd.depth[both]
    assert close.mean() > 0.95

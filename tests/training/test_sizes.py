"""Samples are dealt to processes by sizes that are known before they are read."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from support.planning import ROOT, zero

from gasp_fast.backbones import load_backbone
from gasp_fast.backbones.tiny import SIZES_7B, build_tiny
from gasp_fast.collator import Collator
from gasp_fast.config.loader import load_config
from gasp_fast.data.annotations.settings import AnnotationSettings, store_settings
from gasp_fast.data.annotations.shard import shard_arrays, shard_bytes, shard_path
from gasp_fast.data.scenes.library import SceneEntry
from gasp_fast.data.tracks.build import Tracks
from gasp_fast.data.tracks.sequences import SequenceConfig
from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.dealing import Division
from gasp_fast.planning.gpus import GPUS
from gasp_fast.planning.micro_batch_time import MicroBatchSeconds
from gasp_fast.planning.shapes import LLAVA_NEXT_VIDEO_7B, QWEN2_5_VL_7B
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.loader import make_loader
from gasp_fast.training.sizes import PredictedSizes
from gasp_fast.training.stream import Dealer, SampleStream, Share, StreamBatches
from gasp_fast.training.workload import training_setup

SEQUENCES = SequenceConfig(min_frames=2, max_frames=6, window=4, per_scene=4)
SHAPES = {"qwen2_5_vl_7b": QWEN2_5_VL_7B, "llava_next_video_7b": LLAVA_NEXT_VIDEO_7B}


def test_predicted_sizes_are_those_of_the_batches_that_are_read(config, family):
    settings = config(family, mixed=True, scenes={"sequences": SEQUENCES})
    stream, backbone = SampleStream(settings.data), load_backbone(settings.model.source)
    sizes, collate = PredictedSizes(settings, backbone, stream, stream.frame_sizes()), Collator(backbone)
    frames = set()
    for position in range(24):
        sample, size = stream[position], sizes(position)
        batch = collate([sample])
        tokens = batch["input_ids"].shape[1]
        frames.add(size.frames)
        assert size.frames == len(sample.frames)
        assert size.visual == int((batch["input_ids"] == backbone.visual_token_id).sum())
        assert size.tracked == (size.visual if sample.tracks else 0)
        assert (size.anchors > 0) == bool(sample.tracks)
        assert abs(size.tokens - tokens) <= 20 and size.most_tokens >= tokens  # of the text; it is short here
        assert size.labelled == pytest.approx(int((batch["labels"] != -100).sum()), abs=6)
    assert len(frames) >= 4


def test_sizes_are_predicted_without_reading_a_sample(config, monkeypatch):
    settings = config(mixed=True)
    stream, backbone = SampleStream(settings.data), load_backbone(settings.model.source)
    sizes = PredictedSizes(settings, backbone, stream, stream.frame_sizes())
    monkeypatch.setattr("builtins.open", None)
    monkeypatch.setattr("os.open", None)
    assert len({sizes(position) for position in range(40)}) > 4


def test_a_video_of_another_shape_has_no_more_tokens_than_the_upper_bound(config):
    settings = config(mixed=True)
    stream, backbone = SampleStream(settings.data), load_backbone(settings.model.source)
    sizes = PredictedSizes(settings, backbone, stream, {"scenes": (96, 80), "qa": (96, 40)})
    for position in range(20):
        size, scene = sizes(position), stream.outline(position)[0] == "scenes"
        frame = backbone.frame_grid(96, 80 if scene else 96).tokens
        text = size.most_tokens - size.frames * frame
        assert 0 <= text - (size.tokens - size.visual) <= 16


# ---- shares ---------------------------------------------------------------------------------------------------------


def shares_of(settings, world_size, batch_size=12, **division):
    """The share of each process, dealt by predicted sizes."""
    stream, backbone = SampleStream(settings.data), load_backbone(settings.model.source)
    sizes = PredictedSizes(settings, backbone, stream, stream.frame_sizes())
    setup = replace(training_setup(settings, QWEN2_5_VL_7B), batch_size=batch_size, **division)
    dealer = Dealer(
        batch_size, sizes, Division.of(setup, world_size), MicroBatchSeconds(setup, GPUS["h200"], Assumptions())
    )
    return [Share(rank, world_size, batch_size, deal=dealer.deal, **division) for rank in range(world_size)]


@pytest.mark.parametrize("division", [{"micro_batch_size": 2}, {"tokens_at_once": 200}])
def test_processes_divide_the_positions_of_a_step_among_them(config, division):
    settings = config(mixed=True, scenes={"sequences": SEQUENCES})
    for world_size in (1, 2, 3):
        shares = shares_of(settings, world_size, **division)
        again = shares_of(settings, world_size, **division)
        for step in (0, 5, 3):
            divided = [share.micro_batches(step) for share in shares]
            assert divided == [share.micro_batches(step) for share in again]  # in another process, or after a resume
            positions = [position for of_rank in divided for members in of_rank for position in members]
            assert sorted(positions) == list(range(12 * step, 12 * step + 12))
            assert len({len(of_rank) for of_rank in divided}) == 1


def test_a_step_may_have_fewer_sequences_than_there_are_processes(config):
    shares = shares_of(config(), 4, batch_size=3, tokens_at_once=10_000)
    divided = [share.micro_batches(7) for share in shares]
    assert sorted(map(len, divided)) == [1] * 4
    assert sorted(members for (members,) in divided) == [[], [21], [22], [23]]


def test_no_micro_batch_by_tokens_has_more_of_them(config, family):
    settings = config(family, mixed=True, scenes={"sequences": SEQUENCES})
    (share,) = shares_of(settings, 1, tokens_at_once=400)
    stream, backbone = SampleStream(settings.data), load_backbone(settings.model.source)
    batches = list(make_loader(settings.data, stream, backbone, share, 3, pin_memory=False))
    assert len(batches) == sum(len(share.micro_batches(step)) for step in range(3))
    assert sum(len(batch["input_ids"]) for batch in batches) == 36 and len(batches) < 36
    assert all(batch["input_ids"].numel() <= 400 or len(batch["input_ids"]) == 1 for batch in batches)


def test_packed_micro_batches_are_rows_of_several_sequences_without_padding(config, family):
    train = {"packing": True, "tokens_at_once": 700}
    settings = config(family, mixed=True, scenes={"sequences": SEQUENCES}, train=train)
    (share,) = shares_of(settings, 1, tokens_at_once=700)
    stream, backbone = SampleStream(settings.data), load_backbone(settings.model.source)
    batches = list(make_loader(settings.data, stream, backbone, share, 3, pin_memory=False, packing=True))
    rows = [batch["token_index"].row for batch in batches]
    assert any(row is not None and len(row.lengths) > 2 for row in rows)
    for positions, batch, row in zip(StreamBatches(share, 3), batches, rows, strict=True):
        lengths = [Collator(backbone)([stream[position]])["input_ids"].shape[1] for position in positions]
        assert batch["input_ids"].shape == (1, sum(lengths)) and (len(lengths) == 1 or sum(lengths) <= 700)
        assert list(row.lengths if row else lengths) == lengths


def recipe_dealer(name, folder, world_size):
    """The recipe's stream of 2,000 annotated scenes and 2,000 questions, of which no frame exists, and its dealer."""
    draw = random.Random(0)
    entries = tuple(SceneEntry(f"1K/{n:05d}", draw.randint(100, 400), f"{n:016x}") for n in range(2_000))
    settings = AnnotationSettings(scenes=entries, shard_size=32_000)
    store_settings(folder / "tracks", settings)
    none = shard_arrays(range(len(settings)), [Tracks(*np.zeros((5, 0, 2)))] * len(settings))
    shard_path(folder / "tracks", 0).write_bytes(shard_bytes(none, settings.digest, {}))
    words = ["the", "camera", "turns", "left", "past", "a", "blue", "box"]
    records = []
    for n in range(2_000):
        texts = [" ".join(draw.choices(words, k=draw.randint(5, 300))) for _ in range(2 * draw.randint(1, 4))]
        talk = [{"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(texts)]
        records.append({"id": str(n), "conversations": talk, "data_source": "", "video": f"{n}.mp4"})
    (folder / "questions").mkdir()
    (folder / "questions" / "qa.json").write_text(json.dumps(records))
    overrides = [zero("zero1"), f"data.scenes.root={folder}", f"data.scenes.annotations=[{folder}/tracks]"]
    overrides += [f"data.qa.root={folder}/questions", "data.qa.limit=2000"]
    config = load_config(TrainConfig, ROOT / f"configs/{name}.yaml", overrides)
    family = name.removesuffix("_7b")
    model = build_tiny(folder / "model", SIZES_7B[family], weights=False)
    stream = SampleStream(config.data)
    backbone = load_backbone(model, config.model.frame_pixels)
    sizes = PredictedSizes(config, backbone, stream, {"scenes": (960, 540), "qa": (672, 378)})
    setup = training_setup(config, SHAPES[name])
    seconds = MicroBatchSeconds(setup, GPUS["h200"], Assumptions())
    return Dealer(config.train.batch_size, sizes, Division.of(setup, world_size), seconds)


@pytest.mark.parametrize("name", SHAPES)
def test_with_the_recipes_32_gpus_compute_95_percent_of_the_time_of_the_slowest(name, tmp_path):
    dealer = recipe_dealer(name, tmp_path, world_size=32)
    steps = [dealer.deal(step) for step in range(40)]
    assert sum(step.mean for step in steps) / sum(step.slowest for step in steps) >= 0.95
    seen = {size.tracked > 0 for size in map(dealer.sizes, range(128))}
    assert seen == {True, False}  # geometry and questions

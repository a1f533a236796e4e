"""A run whose model gets frames as a video: what is planned, predicted and counted agrees with its batches."""

from dataclasses import replace

import pytest
import torch
from support.runs import log_of

from gasp_fast.backbones import load_backbone
from gasp_fast.backbones.frames import FRAMES_PER_GRID
from gasp_fast.config.loader import load_config, to_yaml
from gasp_fast.data.tracks.sequences import SequenceConfig
from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.train import train
from gasp_fast.training.config import EvaluateConfig, TrainConfig
from gasp_fast.training.loader import make_loader
from gasp_fast.training.model import build_model
from gasp_fast.training.sizes import PredictedSizes
from gasp_fast.training.stream import SampleStream, Share
from gasp_fast.training.workload import BatchFlops, sequence_mix

SEQUENCES = SequenceConfig(min_frames=2, max_frames=6, window=4, per_scene=4)


@pytest.fixture(params=FRAMES_PER_GRID)
def settings(request, config):
    made = config(mixed=True, scenes={"sequences": SEQUENCES}, qa={"frames": 3}, model={"frames_as": request.param})
    return replace(made, data=replace(made.data, workers=0))


def batches_of(settings, at_once, steps, packing=False):
    stream, backbone = SampleStream(settings.data), load_backbone(settings.model.source, None, settings.model.frames_as)
    share = Share(0, 1, at_once, at_once)
    return stream, backbone, list(make_loader(settings.data, stream, backbone, share, steps, False, packing=packing))


def test_predicted_sizes_are_those_of_the_batches(settings):
    stream, backbone, batches = batches_of(settings, 1, 24)
    sizes = PredictedSizes(settings, backbone, stream, stream.frame_sizes())
    for position, batch in enumerate(batches):
        size, tokens = sizes(position), batch["input_ids"].shape[1]
        assert size.frames == settings.model.grids_of(len(stream[position].frames))
        assert size.visual == len(batch["token_index"].visual)
        assert size.tracked == batch["matches"].tokens and abs(size.tokens - tokens) <= 20 <= size.most_tokens


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_grids_of_each_sequence_of_a_batch_are_counted(settings, packing):
    stream, _, batches = batches_of(settings, 4, 3, packing)
    count = BatchFlops(settings, build_model(settings, torch.device("cpu")))
    for number, batch in enumerate(batches):
        frames = [len(stream[4 * number + place].frames) for place in range(4)]
        assert [size.frames for size in count.sizes(batch)] == list(map(settings.model.grids_of, frames))


def test_a_plan_counts_grids(settings):
    mix = sequence_mix(settings, 10, Assumptions())
    grids = [settings.model.grids_of(frames) for frames in (2, 3, 4, 5, 6, 3)]
    assert [size.frames for _, size in mix] == grids and [size.visual for _, size in mix] == [10 * n for n in grids]


def test_a_run_learns_and_its_first_loss_is_that_of_plain_autograd(settings, plain_step):
    model = build_model(settings, torch.device("cpu"))
    _, _, batches = batches_of(settings, 1, 8)
    batch = next(batch for batch in batches if len(batch["matches"]))
    inputs = {name: batch[name] for name in batch if name not in ("token_index", "counts")}
    plain = plain_step(model, inputs)
    ours = model(**{name: batch[name] for name in batch if name != "counts"})
    torch.testing.assert_close(ours["corr"], plain.corr_per_layer, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["depth"], plain.depth_per_layer, rtol=1e-4, atol=1e-5)
    train(settings)
    assert [record["step"] for record in log_of(settings.run.out)] == [1, 2, 3]


def test_the_choice_is_a_key_of_the_recipe(settings, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(settings))
    assert load_config(TrainConfig, tmp_path / "config.yaml").model.frames_as == settings.model.frames_as
    with pytest.raises(ValueError, match=r"model\.frames_as"):
        load_config(TrainConfig, tmp_path / "config.yaml", ["model.frames_as=film"])


def test_points_of_merged_frames_are_not_scored_while_training(config, assets):
    settings = config(model={"frames_as": "video_pairs"})
    with pytest.raises(ValueError, match=r"evaluate\.scenes scores points frame by frame.*--frames-as video_doubled"):
        replace(settings, evaluate=EvaluateConfig(scenes=(str(assets.scenes),)))

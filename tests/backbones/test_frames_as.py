"""Qwen2-VL and Qwen2.5-VL get frames as images, as a video of pairs, or as a video with each frame twice."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.families import talk

from gasp_fast.backbones import load_backbone
from gasp_fast.backbones.base_model import ModelConfig
from gasp_fast.backbones.frames import FRAMES_PER_GRID
from gasp_fast.backbones.packing import pack
from gasp_fast.backbones.qwen_vl import check_mrope
from gasp_fast.backbones.unmasked_attention import use_unmasked_attention
from gasp_fast.collator import Collator, CollatorConfig, Sample
from gasp_fast.data.tracks.build import Tracks

BOTH = pytest.mark.parametrize("qwen", ["qwen2_5_vl", "qwen2_vl"], indirect=True)
POSITION_INPUTS = ("input_ids", "mm_token_type_ids", "attention_mask", "image_grid_thw", "video_grid_thw")


@pytest.fixture(params=FRAMES_PER_GRID)
def backbone(request, qwen):
    return load_backbone(qwen.folder, frames_as=request.param)


@pytest.fixture
def video(qwen):
    return load_backbone(qwen.folder, frames_as="video_pairs")


def conversations(noise):
    """Of an odd number of frames, of none, and of frames of another size."""
    return [talk(noise(5, 320, 180)), talk([]), talk(noise(4, 224, 224, seed=1), "There are nine boxes and a lamp.")]


# ---- tokens and positions -------------------------------------------------------------------------------------------


@BOTH
def test_positions_are_those_of_transformers(qwen, backbone, noise):
    inputs = backbone.encode(conversations(noise)).inputs
    names = [name for name in (*POSITION_INPUTS, "second_per_grid_ts") if name in inputs]
    expected, _ = qwen.model.model.get_rope_index(**{name: inputs[name] for name in names})
    assert torch.equal(backbone.index_tokens(inputs).rotary, expected)
    backbone.check_inputs(qwen.model, inputs)


def test_a_second_of_a_video_is_two_frames_and_two_positions_in_time(backbone, noise):
    """Grids of 14 x 14 tokens; a video's begins at one position, an image's where the image before it ends."""
    encoded = backbone.encode([talk(noise(4))])
    positions = backbone.index_tokens(encoded.inputs).rotary.flatten(1)[:, encoded.positions[0]]  # [3, N]
    time, row, column = (positions - positions[:, :1]).view(3, -1, 196)
    inside = torch.arange(14)
    if backbone.frames_as == "images":
        starts = torch.arange(4) * (14 + 2)  # with the two tokens between images
        assert torch.equal(time, starts[:, None].expand(4, 196))
        assert torch.equal(row - starts[:, None], inside.repeat_interleave(14).expand(4, 196))
        return
    grids = 2 if backbone.frames_as == "video_pairs" else 4
    assert torch.equal(time, (2 * torch.arange(grids))[:, None].expand(grids, 196))
    assert torch.equal(row, inside.repeat_interleave(14).expand(grids, 196))
    assert torch.equal(column, inside.repeat(14).expand(grids, 196))


@pytest.mark.parametrize("name", ["mm_token_type_ids", "video_grid_thw", "second_per_grid_ts"])
def test_the_mrope_check_raises_when_an_input_of_a_video_is_missing(qwen, video, noise, name):
    inputs = video.encode(conversations(noise)).inputs
    inputs.pop(name)
    with pytest.raises(ValueError, match=f"inputs lack {name}"):
        check_mrope(qwen.model, inputs)


def test_the_mrope_check_raises_for_a_video_that_is_marked_as_images(qwen, video, noise):
    inputs = video.encode(conversations(noise)).inputs
    inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"].clamp(max=1)
    with pytest.raises(ValueError, match="mm_token_type_ids disagrees"):
        check_mrope(qwen.model, inputs)


@BOTH
def test_a_square_in_a_frame_changes_exactly_one_token_of_the_frames_grid(backbone):
    width, height = 320, 180
    blank = np.full((height, width, 3), 90, np.uint8)
    grid, draw = backbone.frame_grid(width, height), np.random.default_rng(0)
    encoded = backbone.encode([talk([blank] * 5)])
    key = "pixel_values" if backbone.frames_as == "images" else "pixel_values_videos"
    before = encoded.inputs[key].reshape(-1, 4 * encoded.inputs[key].shape[1])  # [tokens, values]
    assert encoded.grids == [[grid] * (3 if backbone.frames_as == "video_pairs" else 5)]
    assert len(encoded.positions[0]) == len(before) == grid.tokens * len(encoded.grids[0])
    for frame in range(5):
        token = int(draw.integers(grid.tokens))
        x, y = grid.centres()[token].astype(int)
        frames = [blank.copy() for _ in range(5)]
        frames[frame][y - 1 : y + 2, x - 1 : x + 2] = (255, 32, 0)
        after = backbone.encode([talk(frames)]).inputs[key].reshape(before.shape)
        changed = (after != before).any(1).nonzero()[:, 0].tolist()
        assert changed == [frame // backbone.frames_per_grid * grid.tokens + token]


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("qwen", "attention"), [("qwen2_5_vl", "sdpa"), ("qwen2_5_vl", "eager"), ("qwen2_vl", "sdpa")], indirect=["qwen"]
)
def test_states_are_those_of_the_whole_model(qwen, backbone, noise, packed, attention):
    """With the faster vision modules, unmasked attention and features put at their tokens."""
    plain = backbone.load_model(torch.float32, attention).eval()
    model = copy.deepcopy(plain)
    backbone.replace_slow_modules(model)
    use_unmasked_attention(model)
    samples = [Sample(frames=one.frames, messages=one.messages) for one in conversations(noise)]
    batch = Collator(backbone)(samples)
    batch = {**batch, "token_index": backbone.index_tokens(batch)}
    real = batch["attention_mask"].bool()
    others = ("labels", "matches", "visual_positions", "token_index")
    expected = plain.base_model(**{name: batch[name] for name in batch if name not in others}, use_cache=False)[0]
    batch = pack(batch) if packed else batch
    states = backbone.last_states(model, batch, batch["token_index"])
    torch.testing.assert_close(states[0] if packed else states[real], expected[real], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_doubled_frame_has_the_features_of_an_image(qwen, noise):
    images, doubled = (load_backbone(qwen.folder, frames_as=choice) for choice in ("images", "video_doubled"))
    model = qwen.backbone.load_model(torch.float32)
    features = [one.visual_features(model, one.encode([talk(noise(3))]).inputs) for one in (images, doubled)]
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-5)


def test_the_pixels_of_a_frame_of_a_video_are_limited_too(qwen, noise):
    for choice in FRAMES_PER_GRID:
        backbone = load_backbone(qwen.folder, 100 * 16 * 16, choice)
        encoded = backbone.encode([talk(noise(2, 320, 180))])
        assert 60 < encoded.grids[0][0].tokens <= 100
        assert len(encoded.positions[0]) == sum(grid.tokens for grid in encoded.grids[0])
        # A full run saves its processor: what it does not use must stay as it is.
        images, videos = backbone.processor.image_processor, backbone.processor.video_processor
        limited = [part.size["longest_edge"] == 100 * 16 * 16 for part in (images, videos)]
        assert limited == [choice == "images", choice != "images"]


# ---- matches --------------------------------------------------------------------------------------------------------


def tracked(frames: int, seed: int = 0) -> Sample:
    """Random tracks and depths, a third of which are unknown."""
    draw = np.random.default_rng(seed)
    uv = draw.uniform([0, 0], [320, 180], (40, frames, 2))
    tracks = Tracks(np.arange(frames), uv[:, 0], uv, draw.random((40, frames)) < 0.7, draw.uniform(1, 5, (40, frames)))
    depth = [draw.uniform(1, 5, (45, 80)) * (draw.random((45, 80)) < 0.02) for _ in range(frames)]
    images = [draw.integers(0, 256, (180, 320, 3), dtype=np.uint8) for _ in range(frames)]
    return Sample(frames=images, tracks=[tracks], depth=depth)


@pytest.mark.parametrize("frames", [6, 7])
def test_matches_of_pairs_are_those_of_a_plain_loop(video, frames):
    sample = tracked(frames)
    (tracks,), grid = sample.tracks, video.frame_grid(320, 180)
    expected = []
    for track in range(len(tracks)):
        for one in range(frames):
            for other in range(frames):
                if one // 2 != other // 2 and tracks.visible[track, one] and tracks.visible[track, other]:
                    token = [int(grid.locate(tracks.uv[track, f])) + f // 2 * grid.tokens for f in (one, other)]
                    expected.append((*token, round(float(tracks.depth[track, other]), 4)))
    matches = Collator(video)([sample])["matches"]
    assert matches.frame_offsets.tolist() == [grid.tokens * n for n in range((frames + 1) // 2 + 1)]
    columns = (matches.anchor.tolist(), matches.target.tolist(), matches.target_depth.double().numpy().round(4))
    assert sorted(zip(*columns, strict=True)) == sorted(expected) and len(expected) > 300


@pytest.mark.parametrize("frames", [6, 7])
def test_the_depth_of_a_pairs_token_is_the_mean_over_the_frames_that_know_it(qwen, video, frames):
    sample = tracked(frames)
    alone = Collator(qwen.backbone)([sample])["matches"].patch_depth.view(frames, -1).double()  # [F, tokens]
    pairs = Collator(video)([sample])["matches"].patch_depth.view(-1, alone.shape[1])
    counts = set()
    for number, depth in enumerate(pairs):
        both = alone[2 * number : 2 * number + 2]
        for token in range(len(depth)):
            known = [float(value) for value in both[:, token] if value > 0]
            assert float(depth[token]) == pytest.approx(np.mean(known) if known else 0.0, rel=1e-6)
            counts.add(len(known))
    assert counts == {0, 1, 2}


def test_matches_of_doubled_frames_are_those_of_images(qwen):
    doubled = load_backbone(qwen.folder, frames_as="video_doubled")
    ours, theirs = (Collator(one)([tracked(5)])["matches"] for one in (doubled, qwen.backbone))
    for name in ("frame_offsets", "anchor", "target", "target_depth", "patch_depth", "token_xy"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_two_frames_that_share_a_grid_have_no_match(video):
    assert len(Collator(video)([tracked(2)])["matches"]) == 0


def test_drawn_pairs_of_frames_have_different_grids(video):
    matches = Collator(video, CollatorConfig(anchors="pairs", pairs=4))([tracked(4)])["matches"]
    ends = list(pairwise(matches.frame_offsets.tolist()))
    assert len(ends) == 2 and len(matches)  # `Matches` refuses a match within a grid


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_frames_of_several_sizes_are_no_video(video, noise):
    with pytest.raises(ValueError, match=r"sequence 0 has frames of sizes 224x224, 320x180.*resize"):
        video.encode([talk(noise(1) + noise(1, 320, 180))])


def test_a_model_with_one_way_to_take_frames_refuses_another(llava_video):
    with pytest.raises(ValueError, match="frames_as = 'video_pairs' does not apply to llava_next_video"):
        load_backbone(llava_video.folder, frames_as="video_pairs")
    assert load_backbone(llava_video.folder, frames_as="images").frames_per_grid == 1


def test_an_unknown_way_is_refused(qwen):
    with pytest.raises(ValueError, match="frames_as = 'film' is unknown; choose one of images, video_pairs"):
        load_backbone(qwen.folder, frames_as="film")


@pytest.mark.parametrize(("choice", "grids"), [("images", 7), ("video_pairs", 4), ("video_doubled", 7)])
def test_the_number_of_grids_is_known_without_the_model(choice, grids, qwen, noise):
    config = ModelConfig(source=str(qwen.folder), frames_as=choice)
    backbone = load_backbone(config.source, frames_as=config.frames_as)
    assert config.grids_of(7) == grids == len(backbone.encode([talk(noise(7))]).grids[0])

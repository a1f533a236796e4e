"""The pixel -> token map agrees with the real processor and the real model."""

import numpy as np
import pytest
import torch
from support.families import EVERY_FAMILY

SIZES = [(224, 224), (320, 180), (181, 317), (640, 275), (271, 640), (333, 222), (960, 540)]


def paint(frame: np.ndarray, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    painted = frame.copy()
    painted[top:bottom, left:right] = (255, 32, 0)
    return painted


@EVERY_FAMILY
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_a_painted_square_changes_exactly_the_token_that_the_map_names(family, size, talk):
    width, height = size
    grid = family.backbone.frame_grid(width, height)
    draw = np.random.default_rng(width * height)
    blank = np.full((height, width, 3), 90, np.uint8)
    frames, expected = [blank], []
    # The square and the support of the resize filter around it must lie within one token (or all outside the grid).
    reach = 2 + 2 * max(1, (grid.right - grid.left) / grid.columns / family.token_pixels)
    while len(frames) < 25:
        x, y = int(draw.integers(2, width - 2)), int(draw.integers(2, height - 2))
        if len(frames) < 13:  # half of the points near the centres of tokens, so that enough of them have a token
            x, y = (grid.centres()[draw.integers(grid.tokens)] + draw.uniform(-1, 1, 2)).astype(int).tolist()
        around = [(x + 0.5 + dx, y + 0.5 + dy) for dx in (-reach, reach) for dy in (-reach, reach)]
        tokens = set(grid.locate(around).tolist())
        if len(tokens) == 1:
            frames.append(paint(blank, x - 1, y - 1, x + 2, y + 2))
            expected.append(tokens.pop())
    encoded = family.backbone.encode([talk(frames)])
    pixels = family.pixels_by_token(encoded.inputs, grid.tokens)
    assert pixels.shape[:2] == (len(frames), grid.tokens)
    changed = (pixels[1:] - pixels[:1]).abs().amax(-1) > 0  # [24, tokens]
    for token, row in zip(expected, changed, strict=True):
        assert row.nonzero()[:, 0].tolist() == ([] if token < 0 else [token])
    assert sum(token >= 0 for token in expected) >= 12


@EVERY_FAMILY
@pytest.mark.parametrize("size", [(224, 224), (320, 180), (181, 317)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_language_model_receives_a_square_at_the_position_of_its_token(family, size, talk):
    width, height = size
    grid = family.backbone.frame_grid(width, height)
    blank = np.full((height, width, 3), 90, np.uint8)
    tokens = np.random.default_rng(1).choice(grid.tokens, 6, replace=False)
    frames = [blank]
    cell = np.array([(grid.right - grid.left) / grid.columns, (grid.bottom - grid.top) / grid.rows])
    for centre in grid.centres()[tokens]:
        (left, top), (right, bottom) = np.ceil(centre - 0.4 * cell), np.floor(centre + 0.4 * cell)
        frames.append(paint(blank, int(left), int(top), int(right), int(bottom)))
    encoded = family.backbone.encode([talk(frames)])
    received = layer_zero_input(family, encoded.inputs).flatten(0, 1)[encoded.positions[0]]
    received = received.reshape(len(frames), grid.tokens, -1)
    change = (received[1:] - received[:1]).norm(dim=-1)
    assert change.argmax(-1).tolist() == tokens.tolist()


def layer_zero_input(family, inputs):
    """The hidden states `[B, S, D]` that enter the first decoder layer."""
    received = []
    layer = family.backbone.decoder_layers(family.model)[0]
    handle = layer.register_forward_pre_hook(lambda module, args: received.append(args[0]))
    with torch.no_grad():
        family.model(**inputs)
    handle.remove()
    return received[0]


@EVERY_FAMILY
def test_visual_positions_are_where_the_model_scatters_its_features(family, talk, noise):
    batch = [talk(noise(3, 320, 180)), talk([]), talk(noise(3, 181, 317, seed=1), answer=None)]
    encoded = family.backbone.encode(batch)
    assert [len(p) for p in encoded.positions] == [sum(g.tokens for g in grids) for grids in encoded.grids]
    received = layer_zero_input(family, encoded.inputs).flatten(0, 1)[torch.cat(encoded.positions)]
    with torch.no_grad():
        made = family.visual_features(encoded.inputs)
    torch.testing.assert_close(received, made, rtol=1e-5, atol=1e-6)


def test_the_grid_covers_the_whole_image_on_qwen_and_the_centre_on_llava(qwen, llava_video):
    whole = qwen.backbone.frame_grid(960, 540)
    assert (whole.left, whole.top, whole.right, whole.bottom) == (0, 0, 960, 540)
    centre = llava_video.backbone.frame_grid(960, 540)
    assert (centre.top, centre.bottom) == (0, 540)
    lost = 1 - (centre.right - centre.left) / 960
    assert 0.43 < lost < 0.45
    assert centre.locate([(100, 270), (480, 270)]).tolist()[0] == -1


def test_the_hub_sizes_of_qwen_give_34_by_19_tokens_for_a_dl3dv_frame(qwen):
    from copy import deepcopy

    backbone = deepcopy(qwen.backbone)
    processor = backbone.processor.image_processor
    processor.patch_size, processor.size = 14, {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    grid = backbone.frame_grid(960, 540)
    assert (grid.columns, grid.rows) == (34, 19)
    backbone.limit_frame_pixels(28 * 28 * 200)
    assert backbone.frame_grid(960, 540).tokens <= 200


def test_frames_smaller_than_llavas_crop_are_padded(llava_video, talk):
    from copy import deepcopy

    backbone = deepcopy(llava_video.backbone)
    backbone.processor.video_processor.size = {"shortest_edge": 97}
    grid = backbone.frame_grid(200, 121)
    blank = np.full((121, 200, 3), 90, np.uint8)
    frames = [blank] + [paint(blank, x - 1, 59, x + 2, 62) for x in (40, 100, 160)]
    encoded = backbone.encode([talk(frames)])
    pixels = llava_video.pixels_by_token(encoded.inputs, grid.tokens)
    changed = (pixels[1:] - pixels[:1]).abs().sum(-1).argmax(-1)
    assert changed.tolist() == grid.locate([(40.5, 60.5), (100.5, 60.5), (160.5, 60.5)]).tolist()


def test_points_outside_the_grid_or_not_a_number_are_dropped(qwen):
    grid = qwen.backbone.frame_grid(320, 180)
    outside = [(-0.1, 5), (320, 5), (5, -0.1), (5, 180), (np.nan, 5), (5, np.inf)]
    assert grid.locate(outside).tolist() == [-1] * 6
    assert grid.locate([(0, 0), (319.99, 179.99)]).tolist() == [0, grid.tokens - 1]


@EVERY_FAMILY
def test_every_token_centre_is_located_in_its_own_token(family):
    for width, height in SIZES:
        grid = family.backbone.frame_grid(width, height)
        assert grid.locate(grid.centres()).tolist() == list(range(grid.tokens))
        column, row = grid.xy().T
        assert (row * grid.columns + column).tolist() == list(range(grid.tokens))

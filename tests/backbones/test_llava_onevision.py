"""LLaVA-OneVision pools an odd number of patches, and ends each video with a newline."""

import copy

import numpy as np
import pytest
import torch
from support.families import FAMILIES, Family, talk

from gasp_fast.backbones import load_backbone, tiny
from gasp_fast.backbones.packing import pack
from gasp_fast.backbones.unmasked_attention import use_unmasked_attention
from gasp_fast.collator import Collator, Sample


@pytest.fixture
def onevision(families):
    return families["llava_onevision"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """110 pixels are 13 patches of 8 and 6 pixels that no patch covers; 13 patches are pooled to 7 tokens."""
    folder = tmp_path_factory.mktemp("odd") / "model"
    tiny.build_tiny(folder, tiny.TinyConfig(model_type="llava_onevision", frame_size=110))
    backbone = load_backbone(folder)
    return Family(backbone, backbone.load_model(torch.float32).eval(), folder, *FAMILIES["llava_onevision"])


@torch.no_grad()
def pooled_patches(family, frames):
    """The patches of each frame before attention, as the model pools them: `[frames, tokens, D]`."""
    pixels = family.backbone.encode([talk(frames)]).inputs["pixel_values_videos"][0]
    patches = family.model.model.vision_tower.embeddings.patch_embedding(pixels)  # [F, D, 13, 13]
    return family.model.model.apply_pooling(patches.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("size", [(110, 110), (320, 180), (181, 317)], ids=str)
def test_the_token_under_a_patch_is_the_one_into_which_it_is_pooled_most(odd, size):
    width, height = size
    grid = odd.backbone.frame_grid(width, height)
    assert (grid.columns, grid.rows) == (7, 7)
    blank = np.full((height, width, 3), 90, np.uint8)
    across, down = width / 110 * 8, height / 110 * 8  # a patch in pixels of the frame
    places = [(column, row) for column in (0, 1, 4, 5, 6, 8, 12) for row in (0, 3, 6, 7, 11, 12)]
    frames = [blank]
    for column, row in places:
        frames.append(blank.copy())
        top, bottom = round((row + 0.25) * down), round((row + 0.75) * down)
        frames[-1][top:bottom, round((column + 0.25) * across) : round((column + 0.75) * across)] = (255, 32, 0)
    pooled = pooled_patches(odd, frames)
    change = (pooled[1:] - pooled[:1]).norm(dim=-1)  # [places, tokens]
    centres = [((column + 0.5) * across, (row + 0.5) * down) for column, row in places]
    middle = [6 in place for place in places]  # patch 6 of 13 is pooled into the token of its own in the middle
    assert change.argmax(-1).tolist() == grid.locate(centres).tolist() and any(middle)


def test_pixels_that_fill_no_patch_have_no_token(odd):
    grid = odd.backbone.frame_grid(110, 110)
    assert (grid.left, grid.top, grid.right, grid.bottom) == (0, 0, 104, 104)
    blank = np.full((110, 110, 3), 90, np.uint8)
    painted = blank.copy()
    painted[50:53, 106:] = (255, 32, 0)
    assert grid.locate([(107.5, 51.5)]).tolist() == [-1]
    assert torch.equal(*pooled_patches(odd, [blank, painted]))


def test_a_newline_of_no_frame_ends_the_tokens_of_each_video(onevision, noise):
    encoded = onevision.backbone.encode([talk(noise(2)), talk([]), talk(noise(2, seed=1))])
    visual = (encoded.inputs["input_ids"] == onevision.backbone.visual_token_id).sum(1)
    assert visual.tolist() == [2 * 196 + 1, 0, 2 * 196 + 1] and [len(p) for p in encoded.positions] == [392, 0, 392]
    received = []
    layer = onevision.backbone.decoder_layers(onevision.model)[0]
    handle = layer.register_forward_pre_hook(lambda module, args: received.append(args[0]))
    with torch.no_grad():
        onevision.model(**encoded.inputs)
    handle.remove()
    behind = received[0].flatten(0, 1)[[int(encoded.positions[row][-1]) + 1 for row in (0, 2)]]
    assert torch.equal(behind, onevision.model.model.image_newline.expand_as(behind))


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_videos_of_different_lengths_have_the_states_that_each_has_alone(onevision, noise, packed):
    """transformers takes only videos of one length in a batch."""
    backbone, model = onevision.backbone, copy.deepcopy(onevision.model)
    use_unmasked_attention(model)
    samples = [Sample(frames=one.frames, messages=one.messages) for one in (talk(noise(3)), talk([]), talk(noise(1)))]
    batch = Collator(backbone)(samples)
    batch = {**batch, "token_index": backbone.index_tokens(batch)}
    real = batch["attention_mask"].bool()
    batch = pack(batch) if packed else batch
    states = backbone.last_states(model, batch, batch["token_index"])
    found = states[0].split(real.sum(1).tolist()) if packed else [row[at] for row, at in zip(states, real, strict=True)]
    others = ("labels", "matches", "visual_positions")
    for sample, rows in zip(samples, found, strict=True):
        alone = {name: value for name, value in Collator(backbone)([sample]).items() if name not in others}
        expected = onevision.model.base_model(**alone, use_cache=False)[0][0]
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


def test_the_whole_model_refuses_videos_of_different_lengths(onevision, noise):
    inputs = onevision.backbone.encode([talk(noise(2)), talk(noise(1))]).inputs
    with pytest.raises(ValueError, match="do not match"):
        onevision.model(**inputs)


def test_a_processor_that_crops_or_has_another_size_is_refused(onevision):
    backbone = copy.deepcopy(onevision.backbone)
    backbone.processor.video_processor.size = {"height": 112, "width": 112}
    with pytest.raises(ValueError, match="takes whole frames resized to 224x224"):
        backbone.frame_grid(320, 180)

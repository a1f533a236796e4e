"""InternVL: a frame is one tile, and the tokens around it have no label."""

import copy

import pytest
import torch
from support.families import talk

from gasp_fast.backbones.chat import IGNORE


@pytest.fixture
def internvl(families):
    return families["internvl"]


@pytest.mark.parametrize("size", [(224, 224), (960, 540), (300, 2000)], ids=str)
def test_frames_are_not_cut_into_tiles(internvl, noise, size):
    """The processor cuts single images into tiles by default."""
    assert internvl.backbone.processor.image_processor.crop_to_patches
    encoded = internvl.backbone.encode([talk(noise(3, *size))])
    assert encoded.inputs["pixel_values"].shape == (3, 3, 224, 224) and len(encoded.positions[0]) == 3 * 196
    (grid,) = set(encoded.grids[0])
    assert (grid.columns, grid.rows) == (14, 14) and grid.rectangle == (0, 0, *size)


def test_a_frame_is_between_two_tokens_without_a_label(internvl, noise):
    processor = internvl.backbone.processor
    inputs = internvl.backbone.encode([talk(noise(2))]).inputs
    ids = inputs["input_ids"][0]
    around = torch.isin(ids, torch.tensor([processor.start_image_token_id, processor.end_image_token_id]))
    assert around.sum() == 4 and (inputs["labels"][0, around] == IGNORE).all()


def test_a_processor_with_other_tiles_than_the_model_is_refused(internvl):
    backbone = copy.deepcopy(internvl.backbone)
    backbone.processor.image_processor.size = {"height": 112, "width": 112}
    with pytest.raises(ValueError, match="takes frames resized to its tiles of 224x224"):
        backbone.frame_grid(320, 180)

"""Parts of a model that are found in it are those that its backbone states; what is not found is named."""

import copy

import numpy as np
import pytest
import torch

from gasp_fast.backbones.discovered import DiscoveredBackbone
from gasp_fast.backbones.token_grid import TokenGrid


def test_layers_norm_and_projections_are_those_of_the_families_own_file(family):
    found, stated, model = DiscoveredBackbone(family.model, family.backbone.processor), family.backbone, family.model
    assert found.decoder_layers(model) is stated.decoder_layers(model)
    assert found.final_norm(model) is stated.final_norm(model)
    assert found.layer_count == stated.layer_count and found.hidden_size == stated.hidden_size
    assert found.attention_shape == stated.attention_shape
    for layer in range(found.layer_count):
        for one, other in zip(found.query_projection(model, layer), stated.query_projection(model, layer), strict=True):
            assert one is other


@pytest.mark.parametrize("size", [(224, 224), (320, 180), (181, 317), (640, 275), (960, 540), (112, 112)])
def test_the_measured_map_is_the_stated_one(families, size):
    family = families["llava"]
    measured = DiscoveredBackbone(family.model, family.backbone.processor).frame_grid(*size)
    stated = family.backbone.frame_grid(*size)
    assert (measured.columns, measured.rows) == (stated.columns, stated.rows)
    assert np.abs(np.subtract(measured.rectangle, stated.rectangle)).max() < 0.004 * max(size)


def test_a_joint_projection_gives_its_queries(qwen):
    model = copy.deepcopy(qwen.model)
    backbone = DiscoveredBackbone(model, None)
    attention = backbone.attention(model, 0)
    joint = torch.nn.Linear(attention.q_proj.in_features, 3 * attention.q_proj.out_features)
    queries = attention.q_proj
    with torch.no_grad():
        joint.weight[: queries.out_features], joint.bias[: queries.out_features] = queries.weight, queries.bias
    del attention.q_proj
    attention.qkv_proj = joint
    weight, bias = backbone.query_projection(model, 0)
    assert torch.equal(weight, queries.weight) and torch.equal(bias, queries.bias)
    del attention.qkv_proj
    with pytest.raises(ValueError, match='init="random"'):
        backbone.query_projection(model, 0)


def test_what_cannot_be_found_is_named_with_the_argument_that_states_it(qwen, families):
    flattened = DiscoveredBackbone(qwen.model, qwen.backbone.processor)  # its processor makes rows of patches
    with pytest.raises(ValueError, match=r"frame_grid = None.*224x160.*pixel_values"):
        flattened.frame_grid(224, 160)
    with pytest.raises(ValueError, match=r"frame_grid = None.*image_token"):
        DiscoveredBackbone(qwen.model, None).frame_grid(224, 160)
    llava = families["llava"]
    padded = copy.deepcopy(llava.backbone.processor)
    padded.image_processor.do_center_crop = False
    padded.image_processor.size = {"height": 112, "width": 112}  # squeezes the frame: still a straight line
    squeezed = DiscoveredBackbone(llava.model, padded).frame_grid(320, 180)
    assert np.allclose(squeezed.rectangle, (0, 0, 320, 180), atol=1)
    given = DiscoveredBackbone(llava.model, None, lambda width, height: TokenGrid(2, 1, 0, 0, width, height), 7)
    assert given.frame_grid(10, 20).tokens == 2 and given.visual_token_id == 7
    nameless = copy.deepcopy(llava.model)
    nameless.config.image_token_id = None
    with pytest.raises(ValueError, match="visual_token_id = None"):
        assert DiscoveredBackbone(nameless, None).visual_token_id

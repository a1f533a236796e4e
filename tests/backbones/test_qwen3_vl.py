"""Qwen3-VL: features of several depths enter the decoder, and frames are images."""

import pytest
import torch
from support.families import talk

from gasp_fast.backbones import load_backbone
from gasp_fast.supervision.layer_capture import LayerCapture


@pytest.fixture
def qwen3(families):
    return families["qwen3_vl"]


@torch.no_grad()
def test_the_state_of_a_layer_has_the_features_that_are_added_behind_it(qwen3, noise):
    """At visual tokens, of as many layers as the tower gives features."""
    backbone, model = qwen3.backbone, qwen3.model
    encoded = backbone.encode([talk(noise(2))])
    inputs, positions = encoded.inputs, encoded.positions[0]
    index, made = backbone.index_tokens(inputs), []
    handles = [
        layer.register_forward_hook(lambda module, args, output: made.append(output))
        for layer in backbone.decoder_layers(model)
    ]
    with LayerCapture(backbone.decoder_layers(model), backbone.final_norm(model)) as capture:
        backbone.last_states(model, inputs, index)
    for handle in handles:
        handle.remove()
    deeper = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).deepstack_features
    assert len(deeper) == 2 < backbone.layer_count
    for layer, output in enumerate(made):
        added = capture.hidden(layer) - output
        expected = torch.zeros_like(output)
        if layer < len(deeper):
            expected[0, positions] = torch.cat(tuple(deeper[layer])).view(len(positions), -1)
            assert expected.abs().max() > 0.01
        torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("choice", ["video_pairs", "video_doubled"])
def test_frames_as_a_video_are_refused(qwen3, choice):
    with pytest.raises(ValueError, match=f"frames_as = '{choice}' does not apply to qwen3_vl"):
        load_backbone(qwen3.folder, frames_as=choice)


def test_heads_are_as_wide_as_the_model_says(qwen3):
    """Not the hidden size divided by their number."""
    shape = qwen3.backbone.attention_shape
    assert shape.head_dim == 48 != qwen3.backbone.hidden_size // shape.query_heads

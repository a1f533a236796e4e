"""What a training step looks up is looked up where the batch is made, and the decoder's states stay the same."""

import copy

import pytest
import torch
from support.families import EVERY_FAMILY, EVERY_QWEN
from transformers import AutoModelForImageTextToText

from gasp_fast.backbones.unmasked_attention import use_unmasked_attention


def padded_batch(family, talk, noise):
    """Model inputs of a short sequence, a long one and one without frames, padded to the longest."""
    conversations = [talk(noise(2)), talk(noise(2, 320, 180, seed=1), "There are nine boxes and a lamp."), talk([])]
    inputs = family.backbone.encode(conversations).inputs
    assert not inputs["attention_mask"].all()
    return inputs


@EVERY_FAMILY
def test_visual_and_labelled_tokens_are_those_of_a_plain_loop(family, talk, noise):
    inputs = padded_batch(family, talk, noise)
    index = family.backbone.index_tokens(inputs)
    rows, length = inputs["input_ids"].shape
    visual, answers = [], []
    for row in range(rows):
        for token in range(length):
            if inputs["input_ids"][row, token] == family.backbone.visual_token_id:
                visual.append(row * length + token)
            if token and inputs["labels"][row, token] >= 0:
                answers.append((row * length + token - 1, int(inputs["labels"][row, token])))
    assert index.visual.tolist() == visual and len(visual) > 20
    assert list(zip(index.predicting.tolist(), index.answers.tolist(), strict=True)) == answers and len(answers) > 10


@EVERY_FAMILY
def test_last_states_are_those_of_the_whole_model(family, talk, noise):
    """Without mask, with features that are put at their positions: what padding gets is not compared."""
    model = copy.deepcopy(family.model)
    family.backbone.replace_slow_modules(model)
    use_unmasked_attention(model)
    for inputs in (padded_batch(family, talk, noise), family.backbone.encode([talk([]), talk([], "No.")]).inputs):
        index = family.backbone.index_tokens(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad():
            expected = family.model.base_model(**inputs, use_cache=False)[0]
            states = family.backbone.last_states(model, inputs, index)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(states[real], expected[real], rtol=1e-4, atol=1e-5)
        assert states.shape[:2] == labels.shape


@EVERY_QWEN
def test_rotary_positions_are_the_models_own(qwen, talk, noise):
    inputs = padded_batch(qwen, talk, noise)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    expected, _ = qwen.model.model.get_rope_index(**{name: inputs[name] for name in names})
    assert torch.equal(qwen.backbone.index_tokens(inputs).rotary, expected)


def test_what_the_host_reads_is_not_moved(qwen, talk, noise):
    index = qwen.backbone.index_tokens(padded_batch(qwen, talk, noise))
    moved = index.to("meta")
    assert all(tensor.is_meta for tensor in (moved.visual, moved.predicting, moved.answers, moved.rotary))
    assert moved.on_host["image_grid_thw"].tolist() == index.on_host["image_grid_thw"].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_is_saved_with_an_attention_that_others_have(shipped, tmp_path, attention):
    model = AutoModelForImageTextToText.from_pretrained(shipped.folder, attn_implementation=attention)
    use_unmasked_attention(model)
    model.save_pretrained(tmp_path)
    assert "without_mask" not in (tmp_path / "config.json").read_text()
    assert model.config.text_config._attn_implementation == ("sdpa_without_mask" if attention == "sdpa" else "eager")

"""Only the assistant's answers have labels, for every chat template."""

import pytest
import torch
from support.families import EVERY_FAMILY

from gasp_fast.backbones import Conversation, messages_from_record
from gasp_fast.backbones.chat import IGNORE

TALK = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "<image>\nHow many boxes?"},
    {"role": "assistant", "content": "There are 3 boxes."},
    {"role": "user", "content": "Which one is nearer?"},
    {"role": "assistant", "content": "assistant: the red one"},
]


def supervised(backbone, encoded, row):
    labels = encoded.inputs["labels"][row]
    return backbone.processor.tokenizer.decode(labels[labels != IGNORE])


@EVERY_FAMILY
def test_labels_are_the_answers_and_their_end_and_nothing_else(family, noise):
    encoded = family.backbone.encode([Conversation(noise(2), TALK), Conversation([], TALK[1:3])])
    end = family.backbone.processor.tokenizer.eos_token
    first = supervised(family.backbone, encoded, 0)
    assert first.replace(" There", "There").replace(f"{end} a", f"{end}a") == (
        f"There are 3 boxes.{end}assistant: the red one{end}"
    )
    assert supervised(family.backbone, encoded, 1).strip() == f"There are 3 boxes.{end}"


def test_a_label_is_the_id_of_its_own_token(family, noise):
    inputs = family.backbone.encode([Conversation(noise(1), TALK), Conversation(noise(1), TALK[:3])]).inputs
    chosen = inputs["labels"] != IGNORE
    assert torch.equal(inputs["labels"][chosen], inputs["input_ids"][chosen])
    assert not chosen[inputs["input_ids"] == family.backbone.visual_token_id].any()
    assert not chosen[inputs["attention_mask"] == 0].any()


def test_a_conversation_without_an_answer_has_no_labels(family, noise):
    inputs = family.backbone.encode([Conversation(noise(1), TALK[:2])], add_generation_prompt=True).inputs
    assert (inputs["labels"] == IGNORE).all()
    text = family.backbone.processor.tokenizer.decode(inputs["input_ids"][0])
    assert text.rstrip().lower().endswith(("assistant", "assistant:"))


def test_the_placeholders_of_a_data_set_do_not_count_as_frames(family, noise):
    talk = [{"role": "user", "content": "<image>\nlook <video> here"}]
    encoded = family.backbone.encode([Conversation(noise(2), talk)])
    assert len(encoded.positions[0]) == sum(grid.tokens for grid in encoded.grids[0])


def test_text_that_contains_a_visual_placeholder_raises_an_error(qwen, noise):
    talk = [{"role": "user", "content": "what does <|image_pad|> mean?"}]
    with pytest.raises(ValueError, match=r"contains '<\|image_pad\|>'"):
        qwen.backbone.encode([Conversation(noise(1), talk)])


def test_a_template_that_rewrites_earlier_turns_raises_an_error(families, noise):
    from copy import deepcopy

    backbone = deepcopy(families["qwen2_5_vl"].backbone)
    backbone.processor.chat_template = "{{ messages | length }} turns: " + backbone.processor.chat_template
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        backbone.encode([Conversation(noise(1), TALK)])


def test_records_of_llava_video_become_messages():
    record = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A chair."}]
    assert messages_from_record(record) == [
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "A chair."},
    ]
    with pytest.raises(ValueError, match="turn from 'robot'"):
        messages_from_record([{"from": "robot", "value": ""}])


def test_frames_need_a_user_and_an_answer_needs_a_question(shipped, noise):
    with pytest.raises(ValueError, match="none from the user"):
        shipped.backbone.encode([Conversation(noise(1), TALK[:1])])
    with pytest.raises(ValueError, match="assistant turn before any user turn"):
        shipped.backbone.encode([Conversation([], TALK[2:3])])

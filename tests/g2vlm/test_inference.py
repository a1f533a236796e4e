"""Geometry and answers of photographs."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_g2vlm import (
    IMAGE,
    LAYERS,
    StandInHeads,
    Tail,
    drawn,
    drawn_images,
    drawn_tail,
    tiny_g2vlm,
    tiny_qwen,
)

from gasp_fast.backbones import load_backbone
from gasp_fast.g2vlm import ReconChat, chat_with_recon, recon
from gasp_fast.g2vlm.cache import Cache
from gasp_fast.g2vlm.collator import normalised
from gasp_fast.g2vlm.experts import ExpertsConfig
from gasp_fast.g2vlm.generation import Sampler, generate
from gasp_fast.g2vlm.model import G2VLM

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
QUESTION = "Where is the red chair?"


def tail_of_one():
    tail = drawn_tail()
    return Tail(tail.input_ids[:1], tail.labels[:1], tail.pixel_values[:16], tail.image_grid_thw[:1])


def longer(tail, tokens):
    ids = torch.cat([tail.input_ids, torch.tensor([tokens], dtype=torch.long)], 1)
    return dataclasses.replace(tail, input_ids=ids, labels=ids)


@pytest.mark.parametrize("attention", ["global", "block_causal"])
@torch.no_grad()
def test_each_token_has_the_logits_of_a_model_that_computes_everything_again(attention, monkeypatch):
    monkeypatch.setattr("gasp_fast.g2vlm.cache.SPARE", 3)  # memory is enlarged on the way
    model, images, tail = tiny_g2vlm(attention=attention), drawn_images(batch=1), tail_of_one()
    prefix, cache = torch.tensor([[5, 6]]), Cache(LAYERS)
    model.states(images, prefix=prefix, cache=cache)
    tokens = []
    for _ in range(6):
        ours = model.read(torch.tensor([tokens[-1:]]) if tokens else tail, cache)
        states, _ = model.states(images, longer(tail, tokens), prefix)
        torch.testing.assert_close(ours, model.lm_head(states.tail[:, -1]), **CLOSE)
        tokens.append(int(ours.argmax()))
    cache.rewind(0, 0)
    model.states(images, prefix=prefix, cache=cache)
    assert generate(model, tail, cache, 6) == tokens and len(set(tokens)) > 1


def test_without_photographs_and_qk_norm_it_generates_what_qwen_generates():
    tail, model = tail_of_one(), tiny_g2vlm(zero_map=True, qk_norm=False)
    torch.manual_seed(0)
    theirs = tiny_qwen().generate(
        input_ids=tail.input_ids, pixel_values=tail.pixel_values, image_grid_thw=tail.image_grid_thw,
        mm_token_type_ids=(tail.input_ids == IMAGE).int(), max_new_tokens=8, do_sample=False,
    )[0, tail.input_ids.shape[1] :].tolist()  # fmt: skip
    assert generate(model, tail, Cache(LAYERS), 8) == theirs and len(set(theirs)) > 1
    end = theirs[-1]
    assert generate(model, tail, Cache(LAYERS), 8, ends={end}) == theirs[: theirs.index(end)]


def test_nothing_but_the_new_token_is_computed():
    model, calls = tiny_g2vlm(), []
    layer = model.experts.layers[-1]
    parts = {
        "encoder": model.encoder,
        "visual": model.visual,
        "patches": layer.geometric.qkv,
        "text": layer.semantic.qkv,
    }
    for name, part in parts.items():
        part.register_forward_hook(lambda _, args, __, name=name: calls.append((name, args[0].shape[-2])))
    cache = Cache(LAYERS)
    with torch.no_grad():
        model.states(drawn_images(batch=1), cache=cache)
    generate(model, tail_of_one(), cache, 4)
    counts = [count for name, count in calls if name == "text"]
    assert counts == [6, 16, 1, 1, 1]  # starts and ends of 3 frames, the tail, and the tokens but for the last one
    assert [name for name, _ in calls if name != "text"] == ["encoder", "patches", "visual"]


def test_tokens_are_drawn_by_their_shares():
    logits, draw = torch.tensor([0.5, 0.1, 0.3, 0.1]).log(), Sampler(1.0)
    counts = torch.bincount(torch.tensor([draw(logits) for _ in range(2000)]))
    torch.testing.assert_close(counts / 2000, logits.exp(), atol=0.04, rtol=0)
    assert {Sampler(1.0, top_p=0.6, seed=seed)(logits) for seed in range(40)} == {0, 2}
    assert {Sampler(1.0, top_p=0.5, seed=seed)(logits) for seed in range(20)} == {0}
    assert [Sampler(2.0, seed=7)(logits) for _ in range(3)] == [Sampler(2.0, seed=7)(logits)] * 3


# ---- photographs -----------------------------------------------------------------------------------------------------


def photographs():
    draw = np.random.default_rng(0)
    sizes = (60, 90), (60, 90), (120, 100)
    return [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.fixture(scope="module")
def backbone(assets):
    return load_backbone(assets.models["qwen2_vl"])


@pytest.fixture(scope="module")
def model(backbone):
    torch.manual_seed(0)
    return drawn(G2VLM(backbone.load_model(torch.float32), tiny_g2vlm().encoder, StandInHeads(), ExpertsConfig()))


def test_the_geometry_of_photographs_is_that_of_their_crops():
    model = tiny_g2vlm().train()
    arrays = photographs()
    seen = recon(model, [arrays[0], Image.fromarray(arrays[1]), arrays[2]], side=70)
    assert model.training
    assert seen.images.shape == seen.local.shape == seen.world.shape == (3, 70, 84, 3)
    assert seen.rotation.shape == (3, 3, 3) and seen.translation.shape == (3, 3)
    with torch.no_grad():
        expected = model(normalised(torch.from_numpy(seen.images).movedim(-1, 1)[None])).geometry
    for name in ("local", "world", "rotation", "translation"):
        np.testing.assert_array_equal(getattr(seen, name), getattr(expected, name)[0].numpy())
    np.testing.assert_array_equal(seen.depth, seen.local[..., 2])
    corners = np.array([[0.0, 0.0], [84.0, 70.0]])
    np.testing.assert_allclose(seen.photograph_pixels(2, corners), [[0, 55 / 3], [100, 305 / 3]])
    for frame, crop in enumerate(seen.crops):
        np.testing.assert_allclose(crop.pixels(seen.photograph_pixels(frame, corners)), corners, atol=1e-9)


def test_a_chat_says_what_recomputing_everything_says(model, backbone):
    seen, text = chat_with_recon(model, backbone, photographs(), QUESTION, side=56, max_new_tokens=8)
    chat = ReconChat(model, backbone, photographs(), side=56)
    questions = chat.questions([{"role": "user", "content": QUESTION}])
    pixels = normalised(torch.from_numpy(seen.images).movedim(-1, 1)[None])
    ends, tokens = {backbone.processor.tokenizer.eos_token_id, backbone.processor.tokenizer.pad_token_id}, []
    with torch.no_grad():
        while len(tokens) < 8:
            states, _ = model.states(pixels, longer(questions, tokens))
            token = int(model.lm_head(states.tail[0, -1]).argmax())
            if token in ends:
                break
            tokens.append(token)
    assert text == backbone.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() != ""
    np.testing.assert_array_equal(seen.local, recon(model, photographs(), side=56).local)
    drawn_texts = [chat.ask(QUESTION, 8, temperature=5.0, seed=seed) for seed in (1, 2, 1)]
    assert drawn_texts[0] == drawn_texts[2] != drawn_texts[1]
    assert chat.ask("And the table?", 8) and chat.ask(QUESTION, 8) == text  # earlier questions leave nothing behind


def test_the_model_reads_what_qwens_processor_makes_of_photographs_and_question(model, backbone):
    processor, content = backbone.processor, [*[{"type": "image"}] * 3, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = processor(text=[text], images=photographs(), return_tensors="pt")
    questions = ReconChat(model, backbone, photographs(), side=56).questions([{"role": "user", "content": QUESTION}])
    for name in ("input_ids", "pixel_values", "image_grid_thw"):
        assert torch.equal(getattr(questions, name), expected[name])


def test_an_answer_ends_where_the_model_ends_it(model, backbone):
    chat = ReconChat(model, backbone, photographs(), side=56)
    end = backbone.processor.tokenizer.eos_token_id
    bias = torch.zeros(model.lm_head.out_features)
    bias[end] = 1e4
    calls = []
    with model.lm_head.register_forward_hook(lambda _, __, logits: calls.append(1) or logits + bias):
        assert chat.ask(QUESTION, 8) == "" and len(calls) == 1


def test_what_cannot_be_read_is_refused_with_a_cure(model, backbone, assets):
    small = np.zeros((10, 40, 3), np.uint8)
    for images, message in (
        ([], "images is empty; give at least one photograph"),
        ([photographs()[0], small], r"images\[1\] is 40 x 10 pixels; give at least 14 along each side"),
        ([np.zeros((40, 40), np.uint8)], r"images\[0\] is uint8 \[40, 40\]; give a PIL image, or an array uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            recon(model, images)
        with pytest.raises(ValueError, match=message):
            chat_with_recon(model, backbone, images, QUESTION)
    with pytest.raises(ValueError, match="side = 7 pixels; give 14 to 4096"):
        recon(model, photographs(), side=7)
    for prompt in ("", " \n", [], [{"role": "assistant", "content": "yes"}]):
        with pytest.raises(ValueError, match="prompt is empty; give a question"):
            chat_with_recon(model, backbone, photographs(), prompt)
    for arguments, message in (
        ({"temperature": -1.0}, "temperature = -1.0 is negative"),
        ({"top_p": 0.0}, "top_p = 0.0 is a share"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0; give at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            chat_with_recon(model, backbone, photographs(), QUESTION, side=56, **arguments)
    with pytest.raises(ValueError, match="is a qwen2_5_vl; load that of a Qwen2-VL"):
        ReconChat(model, load_backbone(assets.models["qwen2_5_vl"]), photographs())
    with pytest.raises(ValueError, match=r"pass questions to read\(\)"), torch.no_grad():
        model.states(drawn_images(batch=1), tail_of_one(), cache=Cache(LAYERS))

"""`attach` on real transformers models: loss and gradients as defined, and a model that is left as it was."""

import copy
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from support.families import EVERY_FAMILY
from support.tracked import POINTS, batch_of, tracks_fixture  # noqa: F401 (fixture)

import gasp_fast
from gasp_fast.backbones import tiny_parts
from gasp_fast.backbones.discovered import DiscoveredBackbone
from gasp_fast.supervision.head_files import read_heads, write_heads
from gasp_fast.supervision.heads import CorrespondenceHeads
from gasp_fast.supervision.layer_capture import LayerCapture


@pytest.fixture
def model(family):
    return copy.deepcopy(family.model)


def gradients(*parts):
    return [None if p.grad is None else p.grad.clone() for part in parts for p in part.parameters()]


def clear_gradients(*parts):
    for part in parts:
        for parameter in part.parameters():
            parameter.grad = None


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@EVERY_FAMILY
def test_every_family_is_supervised_at_the_tokens_of_its_frames(family, talk, tracks):
    batch, positions, matches = batch_of(family, talk, tracks)
    model = copy.deepcopy(family.model)
    gasp = gasp_fast.attach(model, family.backbone.processor)
    assert torch.equal(gasp.visual_positions(batch["input_ids"]), positions)
    frames, uv, visible, depth, maps = tracks
    assert torch.equal(gasp.matches(frames, uv, visible, depth, depth_maps=maps).target, matches.target)
    (model(**batch).loss + gasp.loss(positions, matches)).backward()
    assert all(parameter.grad.any() for parameter in gasp.parameters() if parameter.ndim == 2)


def test_loss_and_gradients_are_those_of_heads_on_captured_states(family, model, talk, tracks):
    batch, positions, matches = batch_of(family, talk, tracks)
    backbone = family.backbone
    projections = {n: backbone.query_projection(model, n) for n in range(backbone.layer_count)}
    torch.manual_seed(5)
    heads = CorrespondenceHeads.from_query_projections(projections)
    with LayerCapture(backbone.decoder_layers(model), backbone.final_norm(model)) as capture:
        text = model(**batch).loss
    embeddings = torch.stack([heads(n, capture.tokens(n, positions)) for n in heads.layers])
    expected_loss = gasp_fast.naive_loss(embeddings, matches).loss
    (text + expected_loss).backward()
    expected = gradients(model, heads)

    clear_gradients(model)
    torch.manual_seed(5)
    gasp = gasp_fast.attach(model, backbone.processor)
    loss = model(**batch).loss + gasp.loss(gasp.visual_positions(batch["input_ids"]), matches)
    loss.backward()
    torch.testing.assert_close(gasp.metrics["loss"], expected_loss.detach(), rtol=1e-5, atol=0)
    assert set(gasp.metrics) == {"loss", "corr", "depth", "pck", "cosine"} and len(gasp.metrics["pck"]) == 4
    assert_close(gradients(model, gasp), expected)

    clear_gradients(model, gasp)
    gasp.join(model)  # and the same where the model takes the matches itself
    model(**batch, matches=matches).loss.backward()
    assert_close(gradients(model), expected)  # the heads are in the model now
    assert all(any(own is p for p in model.parameters()) for own in gasp.parameters())


def test_matches_of_tracks_are_those_of_the_collator(shipped, talk, tracks):
    frames, uv, visible, depth, maps = tracks
    _, _, expected = batch_of(shipped, talk, tracks)
    gasp = gasp_fast.attach(copy.deepcopy(shipped.model), shipped.backbone.processor)
    uv = np.where(visible[..., None], uv, np.nan)  # a tracker may leave out what it does not see
    with np.errstate(invalid="raise"):
        found = gasp.matches([Image.fromarray(frame) for frame in frames], uv, visible, depth, depth_maps=maps)
    for name in ("frame_offsets", "anchor", "target", "target_depth", "patch_depth", "token_xy"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert len(found) > 40

    at_points = gasp.matches(frames, uv, visible, depth_maps=maps)
    grid = shipped.backbone.frame_grid(160, 120)
    point = next(t for t in range(POINTS) if visible[t, :2].all() and (grid.locate(uv[t, :2]) >= 0).all())
    tokens = grid.locate(uv[point, :2])
    match = (at_points.anchor == int(tokens[0])) & (at_points.target == int(tokens[1]) + grid.tokens)
    x, y = uv[point, 1]
    assert float(maps[1][int(y / 2), int(x / 2)]) in at_points.target_depth[match].tolist()
    without = gasp.matches(frames, uv, visible)
    assert without.patch_depth is None and torch.equal(without.anchor, expected.anchor)
    turned = gasp.matches(torch.tensor(np.stack(frames)).permute(0, 3, 1, 2), uv, visible)  # channels first
    assert torch.equal(turned.target, without.target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a sequence without tracks is no mistake
        none = gasp.matches(frames, uv[:0], visible[:0])
    assert len(none) == 0 and none.tokens == without.tokens
    first = gasp.matches(frames, uv, visible, anchors="first")
    assert 0 < len(first) < len(without) and int(first.anchor.max()) < grid.tokens


def test_adapters_may_come_before_or_after_and_checkpointing_changes_nothing(qwen, talk, tracks):
    batch, positions, matches = batch_of(qwen, talk, tracks)
    settings = peft.LoraConfig(r=4, target_modules=qwen.backbone.lora_targets, init_lora_weights=False)
    found = {}
    for order in ("before", "after", "checkpointed"):
        torch.manual_seed(1)
        model = copy.deepcopy(qwen.model).train()
        if order == "after":
            gasp = gasp_fast.attach(model, qwen.backbone.processor)
            torch.manual_seed(1)
        adapted = peft.get_peft_model(model, settings)
        if order != "after":
            state = torch.get_rng_state()
            torch.manual_seed(1)
            gasp = gasp_fast.attach(adapted, qwen.backbone.processor)
            torch.set_rng_state(state)
        if order == "checkpointed":
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        (adapted(**batch).loss + gasp.loss(positions, matches)).backward()
        found[order] = gradients(adapted, gasp)
    assert any(gradient is not None and gradient.any() for gradient in found["before"])
    assert_close(found["after"], found["before"])
    assert_close(found["checkpointed"], found["before"])


def test_a_joined_model_saves_and_loads_as_before_and_detach_leaves_no_trace(qwen, talk, tracks, tmp_path):
    batch, _, matches = batch_of(qwen, talk, tracks)
    model = copy.deepcopy(qwen.model)
    names, before = list(model.state_dict()), model(**batch).logits
    gasp = gasp_fast.attach(model, qwen.backbone.processor, layers="2-3")
    gasp.join(model)
    assert list(model.state_dict()) == names
    model.load_state_dict(model.state_dict())  # strict
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "gasp" in name]  # noqa: SIM118 (not a dict)
    with pytest.raises(RuntimeError, match="already"):
        gasp.join(model)
    with torch.no_grad():
        assert torch.equal(model(**batch, matches=matches).logits, before)  # the output is unchanged
    assert gasp.metrics["corr"].shape == (2,)
    model(**batch)  # without matches
    assert gasp.metrics == {}
    gasp.detach()
    assert [name for name, _ in model.named_parameters() if "gasp" in name] == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_forward_pass_is_used_once_and_its_states_are_freed(qwen, talk, tracks):
    batch, positions, matches = batch_of(qwen, talk, tracks)
    gasp = gasp_fast.attach(copy.deepcopy(qwen.model), qwen.backbone.processor)
    with pytest.raises(ValueError, match="call the model first"):
        gasp.loss(positions, matches)
    model = copy.deepcopy(qwen.model)
    gasp = gasp_fast.attach(model, qwen.backbone.processor)
    model(**batch)
    first = gasp.loss(positions, matches)
    with pytest.raises(ValueError, match="each forward pass serves one"):
        gasp.loss(positions, matches)
    with torch.no_grad():
        model(**batch)
        model(**{**batch, "input_ids": batch["input_ids"]})  # the latest forward pass counts
        assert torch.allclose(gasp.loss(positions, matches), first)
    with pytest.raises(ValueError, match=r"visual_positions has \d+ tokens"):
        gasp.loss(positions[1:], matches)


def test_saved_heads_continue_and_others_are_refused(qwen, tmp_path):
    attach = {"processor": qwen.backbone.processor, "layers": "2-4", "input": "output_normed"}
    gasp = gasp_fast.attach(copy.deepcopy(qwen.model), **attach)
    with torch.no_grad():
        for parameter in gasp.parameters():
            parameter.normal_()
    file = gasp.save(tmp_path / "model")
    assert read_heads(file).reads == "output_normed"
    again = gasp_fast.attach(copy.deepcopy(qwen.model), **attach)
    again.load(tmp_path / "model")
    assert all(map(torch.equal, again.parameters(), gasp.parameters()))
    for other in ({"layers": "1-3"}, {"mid_size": 8}, {"input": "output"}):
        refused = gasp_fast.attach(copy.deepcopy(qwen.model), **{**attach, **other})
        with pytest.raises(ValueError, match="attach with the same settings"):
            refused.load(tmp_path / "model")


def test_heads_of_a_folder_are_attached_with_their_layers_and_sizes(qwen, tmp_path):
    gasp = gasp_fast.attach(copy.deepcopy(qwen.model), layers="2-3", input="output_normed", mid_size=8)
    gasp.save(tmp_path)
    again = gasp_fast.attach(copy.deepcopy(qwen.model), init=tmp_path)
    assert again.layers == [1, 2] and again.supervision.reads == "output_normed"
    assert all(map(torch.equal, again.parameters(), gasp.parameters()))
    with pytest.raises(OSError, match="no such file"):
        gasp_fast.attach(copy.deepcopy(qwen.model), init=tmp_path / "nothing")
    wide = CorrespondenceHeads({0: gasp_fast.CorrespondenceHead(8)})
    write_heads(tmp_path / "heads.safetensors", wide.state_dict(), "fp32")
    with pytest.raises(ValueError, match="8 wide states; this model has 4 layers of 128"):
        gasp_fast.attach(copy.deepcopy(qwen.model), init=tmp_path)


def test_wrong_arguments_are_named(qwen, tracks):
    frames, uv, visible, _, maps = tracks
    model = copy.deepcopy(qwen.model)
    with pytest.raises(TypeError, match="model is a Linear"):
        gasp_fast.attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layers = '9'"):
        gasp_fast.attach(model, layers="9")
    without = gasp_fast.attach(model)
    with pytest.raises(ValueError, match="processor = None"):
        without.matches(frames, uv, visible)
    with pytest.raises(RuntimeError, match="earlier attach; call detach"):
        gasp_fast.attach(model, qwen.backbone.processor)
    without.detach()
    for wrong, message in (
        ({"loss": {"temperature": 0.1}}, "pass a gasp_fast.LossConfig"),
        ({"processor": qwen.backbone.processor.tokenizer}, "without an image processor"),
        ({"init": "svdd"}, 'use init="svd", init="random", or a folder'),
    ):
        with pytest.raises((TypeError, OSError), match=message):
            gasp_fast.attach(model, **{"processor": qwen.backbone.processor, **wrong})
    gasp = gasp_fast.attach(model, qwen.backbone.processor, loss=gasp_fast.LossConfig(temperature=0.1))
    for wrong, message in (
        ({"uv": uv[:, :2]}, "do not fit 3 images"),
        ({"visible": visible[:5]}, "do not fit 3 images"),
        ({"depth": np.ones(3)}, r"depth \[3\] must be"),
        ({"uv": uv.swapaxes(0, 1), "visible": visible.T}, r"turn .* with uv.transpose\(1, 0, 2\)"),
        ({"uv": uv / (160, 120)}, "multiply x by 160 and y by 120"),
        ({"images": ["a.png", "b.png", "c.png"]}, r"images\[0\] has the shape \[\]"),
        ({"depth": np.ones(visible.shape)}, r"pass depth_maps=\[...\]"),
        ({"depth_maps": maps[:2]}, "2 depth maps for 3 images; pass one for each"),
        ({"depth_maps": [one[None] for one in maps]}, r"depth_maps\[0\] has the shape .*squeeze"),
        ({"query_frame": 3}, "query_frame = 3"),
        ({"anchors": "some"}, "anchors = 'some'"),
    ):
        with pytest.raises(ValueError, match=message):
            gasp.matches(**{"images": frames, "uv": uv, "visible": visible, **wrong})
    with pytest.warns(UserWarning, match=r"no match, .* 60 are visible in two images or more, and 0 of these lie"):
        gasp.matches(frames, uv + 1000, visible | True)
    with torch.device("meta"):
        absent = type(model)(model.config)
    with pytest.raises(ValueError, match="not in memory"):
        gasp_fast.attach(absent)


def paligemma():
    """A tiny PaliGemma, which the package has no file for, and its processor: 7 x 7 tokens for every frame."""
    tokenizer = tiny_parts.tiny_tokenizer(
        ["<image>", "<bos>", "<eos>", "<pad>"], tiny_parts.TinyConfig(), pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    images = transformers.SiglipImageProcessor(size={"height": 56, "width": 56})
    images.image_seq_length = 49
    processor = transformers.PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 56, "patch_size": 8, "projection_dim": 64, "vision_use_head": False,
    }  # fmt: skip
    text = {
        "model_type": "gemma", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_id=image_id, projection_dim=64
    )
    torch.manual_seed(0)
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def test_a_model_without_a_file_of_its_own_is_supervised_at_the_tokens_that_show_the_points(tracks):
    frames, uv, visible, _, _ = tracks
    model, processor = paligemma()
    gasp = gasp_fast.attach(model, processor)
    assert isinstance(gasp.backbone, DiscoveredBackbone) and gasp.layers == [0, 1]
    grid, tokens = gasp.backbone.frame_grid(160, 120), [3, 17, 40]
    painted = [np.full((120, 160, 3), 90, np.uint8) for _ in range(4)]
    for frame, (x, y) in zip(painted[1:], grid.centres()[tokens].astype(int), strict=True):
        frame[y - 5 : y + 6, x - 6 : x + 7] = (255, 32, 0)

    def inputs(images):
        return processor(
            text=["<image>" * len(images) + "what?"], images=[images], suffix=["a room"], return_tensors="pt"
        )

    received = {}
    hook = gasp.backbone.decoder_layers(model)[0].register_forward_pre_hook(
        lambda module, args, kwargs: received.update(state=args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    batch = inputs(painted)
    with torch.no_grad():
        model(**batch)
    hook.remove()
    rows = received["state"].flatten(0, 1)[gasp.visual_positions(batch["input_ids"])].reshape(4, 49, -1)
    assert (rows[1:] - rows[:1]).norm(dim=-1).argmax(-1).tolist() == tokens

    matches = gasp.matches(frames, uv, visible)
    point = int(np.flatnonzero(visible[:, 0] & visible[:, 1])[0])
    tokens = grid.locate(uv[point, :2])
    assert ((matches.anchor == int(tokens[0])) & (matches.target == 49 + int(tokens[1]))).any()
    batch = inputs(frames)
    loss = model(**batch).loss + gasp.loss(gasp.visual_positions(batch["input_ids"]), matches)
    loss.backward()
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad.any()


def test_a_tokenizer_without_bos_is_named_as_the_cause(tracks):
    frames, uv, visible, _, _ = tracks
    model, processor = paligemma()
    processor.tokenizer.bos_token = None
    gasp = gasp_fast.attach(model, processor)
    with pytest.raises(ValueError, match="has no BOS token") as refused:
        gasp.matches(frames, uv, visible)
    assert "frame_grid" not in str(refused.value)

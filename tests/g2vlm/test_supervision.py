"""GASP's supervision of the semantic expert."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from support.box_world import BoxWorld
from support.tiny_g2vlm import StandInHeads, drawn, drawn_images, tiny_g2vlm

from gasp_fast.backbones import Conversation, load_backbone
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.tracks.build import build_tracks
from gasp_fast.g2vlm.batch import GeometryBatch, Questions
from gasp_fast.g2vlm.checkpoint import official_weights
from gasp_fast.g2vlm.experts import ExpertsConfig
from gasp_fast.g2vlm.model import G2VLM
from gasp_fast.g2vlm.supervision import G2GaspConfig, build_gasp, gasp_capture, gasp_terms, sequence_matches
from gasp_fast.loss.config import LossConfig
from gasp_fast.loss.function import gasp_loss
from gasp_fast.loss.matches import Matches
from gasp_fast.supervision.heads import CorrespondenceHead, HeadsConfig

CPU = torch.device("cpu")
FRAMES = ((0, 2, 4), (5, 3, 1))  # of two sequences


@dataclass(frozen=True)
class Joint:
    """A model, and a pack of the joint stage with matches."""

    model: G2VLM
    pack: GeometryBatch
    visual: torch.Tensor  # flat positions in the tail of what the matches number


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return open_scene(BoxWorld(frames=6).write_rgbd(tmp_path_factory.mktemp("scenes") / "room"))


@pytest.fixture(scope="module")
def backbone(assets):
    return load_backbone(assets.models["qwen2_vl"], frame_pixels=112 * 112)


@pytest.fixture(scope="module")
def joint(backbone, scene):
    torch.manual_seed(0)
    model = drawn(G2VLM(backbone.load_model(torch.float32), tiny_g2vlm().encoder, StandInHeads(), ExpertsConfig()))
    talks, matches = [], []
    for frames, text in zip(FRAMES, ("Where?", "Which of them is nearer?"), strict=True):
        images = [scene.image(frame) for frame in frames]
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "The left one."}]
        talks.append(Conversation(images, messages))
        matches.append(sequence_matches(backbone, G2GaspConfig(), scene, frames, images))
    encoded = backbone.encode(talks)
    names = ("input_ids", "labels", "attention_mask", "pixel_values", "image_grid_thw")
    questions = Questions(**{name: encoded.inputs[name] for name in names})
    pack = GeometryBatch(drawn_images(), None, None, None, questions, Matches.pack(matches))
    return Joint(model, pack, torch.cat(encoded.positions))


def supervised(joint, config):
    torch.manual_seed(0)
    return build_gasp(joint.model, config, CPU)


def streamed(joint, supervision, pack=None):
    """The terms, and the gradients of their loss by the names of parameters."""
    pack = pack or joint.pack
    with gasp_capture(supervision, joint.model) as capture:
        joint.model(pack.images, pack.questions)
    terms = gasp_terms(supervision, capture, joint.model, pack)
    modules = torch.nn.ModuleDict({"model": joint.model, "gasp": supervision})
    modules.zero_grad()
    terms["loss"].backward()
    return terms, {name: p.grad for name, p in modules.named_parameters() if p.grad is not None}


def plain(joint, supervision, config, monkeypatch):
    """The same by autograd alone, of a model that keeps its activations."""
    model, pack, outputs = joint.model, joint.pack, []
    monkeypatch.setattr(model.experts, "config", ExpertsConfig(checkpointing="off"))
    hooks = [
        layer.register_forward_hook(lambda _, __, found: outputs.append(found[0])) for layer in model.experts.layers
    ]
    model(pack.images, pack.questions)
    for hook in hooks:
        hook.remove()
    norms = [*(layer.semantic.input_norm for layer in model.experts.layers[1:]), model.experts.semantic_norm]
    losses, corrs = [], []
    for index in supervision.layers:
        tail = outputs[index][:, -pack.questions.input_ids.shape[1] :]
        rows = tail.flatten(0, 1)[joint.visual]
        if config.heads.input == "output_normed":
            rows = F.rms_norm(rows, rows.shape[-1:], norms[index].weight, norms[index].eps)
        found = gasp_loss(
            supervision.heads(index, rows)[None], pack.matches, backend="torch", temperature=config.loss.temperature,
            corr_weight=config.loss.corr_weight, depth_weight=config.loss.depth_weight,
        )  # fmt: skip
        losses.append(found.loss)
        corrs.append(found.corr_per_layer)
    loss = torch.stack(losses).mean()
    modules = torch.nn.ModuleDict({"model": model, "gasp": supervision})
    modules.zero_grad()
    loss.backward()
    grads = {name: p.grad for name, p in modules.named_parameters() if p.grad is not None}
    return loss, torch.cat(corrs), grads


@pytest.mark.parametrize(("read", "layers"), [("output", "1-4"), ("output_normed", "1,3-4")])
def test_losses_and_gradients_are_those_of_plain_autograd(joint, monkeypatch, read, layers):
    config = G2GaspConfig(weight=0.5, heads=HeadsConfig(input=read, layers=layers), loss=LossConfig(temperature=0.1))
    supervision = supervised(joint, config)
    assert supervision.layers == {"1-4": [0, 1, 2, 3], "1,3-4": [0, 2, 3]}[layers] and len(joint.pack.matches) > 100
    terms, ours = streamed(joint, supervision)
    loss, corr, theirs = plain(joint, supervision, config, monkeypatch)
    torch.testing.assert_close(terms["loss"], loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms["corr"], corr, atol=1e-5, rtol=1e-5)
    assert terms["pck"].shape == terms["depth"].shape == corr.shape and terms["depth"].isfinite().all()
    assert ours.keys() == theirs.keys()
    largest = {name: grad.abs().max() for name, grad in theirs.items()}
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], atol=1e-4 * float(largest[name]) + 1e-9, rtol=1e-3, msg=name)
    moved = [name for name, grad in ours.items() if grad.any()]
    for part in ("model.experts.layers.0.semantic.qkv.weight", "model.experts.layers.0.geometric.qkv.weight", "gasp."):
        assert any(name.startswith(part) for name in moved), part


def test_heads_begin_as_the_query_projections_of_the_semantic_expert(joint):
    supervision, weights = supervised(joint, G2GaspConfig(weight=1)), official_weights(joint.model)
    for layer in supervision.layers:
        name = f"language_model.model.layers.{layer}.self_attn.q_proj"
        expected = CorrespondenceHead.from_query_projection(weights[f"{name}.weight"], weights[f"{name}.bias"])
        head = supervision.heads.by_layer[str(layer)]
        torch.testing.assert_close(head.state_dict(), expected.state_dict())


def test_matches_are_the_tokens_under_the_tracked_points(backbone, scene):
    frames, config = FRAMES[1], G2GaspConfig(grids=(6,), keep=1.0)
    images = [scene.image(frame) for frame in frames]
    grids = [backbone.frame_grid(image.shape[1], image.shape[0]) for image in images]
    tracks = build_tracks(scene, frames, 6, 1.0)
    expected = []
    for point, seen in zip(tracks.uv, tracks.visible, strict=True):
        column = [
            int(x / image.shape[1] * grid.columns) for (x, _), image, grid in zip(point, images, grids, strict=True)
        ]
        row = [int(y / image.shape[0] * grid.rows) for (_, y), image, grid in zip(point, images, grids, strict=True)]
        token = [f * grids[0].tokens + row[f] * grids[f].columns + column[f] for f in range(3)]
        expected += [(token[a], token[b]) for a in range(3) for b in range(3) if a != b and seen[a] and seen[b]]
    matches = sequence_matches(backbone, config, scene, frames, images)
    assert sorted(zip(matches.anchor.tolist(), matches.target.tolist(), strict=True)) == sorted(expected) != []


def test_without_weight_nothing_is_added(joint):
    assert supervised(joint, G2GaspConfig()) is None
    with torch.no_grad():
        expected = joint.model(joint.pack.images, joint.pack.questions)
        for supervision in (None, supervised(joint, G2GaspConfig(weight=1))):
            with gasp_capture(supervision, joint.model) as capture:
                found = joint.model(joint.pack.images, joint.pack.questions)
            assert torch.equal(found.text_loss, expected.text_loss) and capture.empty == (supervision is None)
            assert torch.equal(found.geometry.local, expected.geometry.local)
            capture.clear()
            joint.model(joint.pack.images)
            assert capture.empty  # it ended


def test_a_pack_without_matches_gives_zeros(joint):
    supervision = supervised(joint, G2GaspConfig(weight=1))
    for pack in (replace(joint.pack, matches=None), replace(joint.pack, matches=None, questions=None)):
        terms, gradients = streamed(joint, supervision, pack)
        assert terms["loss"] == 0
        of_heads = [grad for name, grad in gradients.items() if name.startswith("gasp.")]
        assert len(of_heads) == len(list(supervision.parameters())) and not any(grad.any() for grad in of_heads)


def test_packs_move_with_their_matches(joint):
    moved = joint.pack.to("meta")
    assert moved.matches.device.type == moved.questions.input_ids.device.type == "meta"
    assert len(moved.matches) == len(joint.pack.matches)


def test_what_does_not_fit_is_refused(joint):
    supervision = supervised(joint, G2GaspConfig(weight=1))
    with gasp_capture(supervision, joint.model) as capture, torch.no_grad():
        joint.model(joint.pack.images, joint.pack.questions)
    half = joint.pack.questions.input_ids[:1]
    for questions in (replace(joint.pack.questions, input_ids=half), None):
        with pytest.raises(ValueError, match="both must be of the same frames"):
            gasp_terms(supervision, capture, joint.model, replace(joint.pack, questions=questions))
    for fields, message in (
        ({"weight": -1.0}, "gasp.weight = -1.0"),
        ({"grids": ()}, r"gasp.grids = \[\]"),
        ({"keep": 0.0}, "gasp.keep = 0.0"),
        ({"heads": HeadsConfig(kind="qk")}, "gasp.heads.kind = qk"),
        ({"weight": 1.0, "loss": LossConfig(corr_weight=0, depth_weight=0)}, "set gasp.weight=0"),
    ):
        with pytest.raises(ValueError, match=message):
            G2GaspConfig(**fields)

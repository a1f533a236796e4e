"""Whatever a batch holds, the same modules run and the same weights receive a gradient; how heads are built."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.runs import run_to_end

from gasp_fast.attachment.build import build_heads
from gasp_fast.collator import Collator, Sample
from gasp_fast.config.loader import to_yaml
from gasp_fast.supervision.head_files import read_heads
from gasp_fast.supervision.heads import CorrespondenceHead, HeadsConfig
from gasp_fast.training import weights
from gasp_fast.training.distributed import Processes
from gasp_fast.training.loader import SteadyCollator
from gasp_fast.training.model import build_model, language_loss
from gasp_fast.training.stream import SampleStream
from gasp_fast.training.weights import gather_weights, write_weights

CPU = torch.device("cpu")
WORDS = [{"role": "user", "content": "How many boxes?"}, {"role": "assistant", "content": "Three."}]


def modules_of_a_step(model, batch):
    """Names of the modules with weights in the order in which they run, and of the weights that get a gradient."""
    ran = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    model.zero_grad(set_to_none=True)
    model(**batch)["loss"].backward()
    for handle in handles:
        handle.remove()
    return ran, {name for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_scenes_questions_and_text_only_batches_run_the_same_modules_in_the_same_order(config, family, mode):
    settings = config(family, mixed=True, train={"mode": mode})
    model = build_model(settings, CPU).train()
    collate = SteadyCollator(Collator(model.backbone))
    stream = SampleStream(settings.data)
    scenes = next(s for s in map(stream.__getitem__, range(50)) if s.tracks)
    question = next(s for s in map(stream.__getitem__, range(50)) if s.messages)
    bare = Sample(frames=[], messages=WORDS)
    steps = [modules_of_a_step(model, collate([sample])) for sample in (scenes, question, bare)]
    assert steps[0] == steps[1] == steps[2]
    assert any("visual" in name or "vision_tower" in name for name in steps[0][0])


def test_the_blank_frame_does_not_change_text_gradients(config):
    settings = config(train={"mode": "full"})
    model = build_model(settings, CPU).train()
    bare = Sample(frames=[], messages=WORDS)
    plain = Collator(model.backbone)([bare])
    steady = SteadyCollator(Collator(model.backbone))([bare])
    assert len(steady["input_ids"]) == 2 and "pixel_values" in steady and "pixel_values" not in plain
    grads = []
    for batch in (plain, steady):
        model.zero_grad(set_to_none=True)
        out = model(**batch)
        out["loss"].backward()
        grads.append((out["lm"].item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert grads[1][0] == pytest.approx(grads[0][0], rel=1e-5)
    for name, grad in grads[0][1].items():
        torch.testing.assert_close(grads[1][1][name], grad, rtol=1e-3, atol=1e-6)
    for name in grads[1][1].keys() - grads[0][1].keys():
        assert not grads[1][1][name].any(), name


def test_language_loss_is_the_models_own(config, family):
    settings = config(family, mixed=True, scenes={"root": ""})
    model = build_model(settings, CPU).eval()
    batch = Collator(model.backbone)([SampleStream(settings.data)[0]])
    batch.pop("matches"), batch.pop("visual_positions")
    own = model.model(**batch, use_cache=False)
    labels = batch.pop("labels")
    hidden = model.model.get_base_model().model(**batch, use_cache=False)[0]
    index = model.backbone.index_tokens({**batch, "labels": labels})
    torch.testing.assert_close(language_loss(model.model, hidden, index), own.loss, rtol=1e-5, atol=1e-6)
    assert len(index.answers) == (labels[:, 1:] != -100).sum()


def test_logits_are_made_for_labelled_tokens_only(config):
    settings = config(mixed=True, scenes={"root": ""})
    model = build_model(settings, CPU)
    batch = Collator(model.backbone)([SampleStream(settings.data)[0]])
    rows = []
    handle = model.model.get_output_embeddings().register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    out = model(**batch)
    handle.remove()
    assert rows == [int(out["answers"])] and rows[0] < batch["input_ids"].shape[1] / 2


def test_a_batch_with_frames_is_passed_on_unchanged(config):
    model = build_model(config(), CPU)
    sample = Sample(frames=[np.zeros((64, 64, 3), np.uint8)] * 2, messages=WORDS)
    collate = Collator(model.backbone)
    assert torch.equal(SteadyCollator(collate)([sample])["input_ids"], collate([sample])["input_ids"])


def test_heads_start_as_the_query_projections_of_their_layers_and_their_time_is_measured(config, family):
    model = build_model(config(family, heads={"layers": "2-3"}), CPU)
    assert model.supervision.layers == [1, 2] and model.head_seconds > 0
    for layer, supervised in zip((1, 2), model.supervision.by_layer.values(), strict=True):
        expected = CorrespondenceHead.from_query_projection(*model.backbone.query_projection(model.model, layer))
        assert all(map(torch.equal, supervised.head.parameters(), expected.parameters()))


def test_heads_can_start_without_the_bias_of_the_query_projection(config, family):
    model = build_model(config(family), CPU)
    biases = [model.backbone.query_projection(model.model, layer)[1] for layer in range(4)]
    for bias in biases:
        if bias is not None:
            torch.nn.init.normal_(bias)  # it is zero in a random model
    copied, zero = (
        build_heads(HeadsConfig(bias=bias), model.backbone, model.model, CPU).by_layer for bias in ("copy", "zero")
    )
    for bias, with_bias, without in zip(biases, copied.values(), zero.values(), strict=True):
        assert not without.second.bias.any() and not without.first.bias.any()
        assert torch.equal(with_bias.second.bias, torch.zeros_like(without.second.bias) if bias is None else bias)
        assert torch.equal(with_bias.first.weight, without.first.weight)
        assert torch.equal(with_bias.second.weight, without.second.weight)
    assert any(bias is not None for bias in biases) == (family == "qwen2_5_vl")


def test_a_checkpoint_records_what_its_heads_read(config, tmp_path):
    model = build_model(config(heads={"input": "output_normed"}), CPU)
    write_weights(model, tmp_path, gather_weights(model, Processes(0, 1, CPU)))
    assert read_heads(tmp_path / "heads.safetensors").reads == model.supervision.reads == "output_normed"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_weights_are_gathered_in_the_order_of_the_model(config, monkeypatch, mode):
    """All processes gather together under ZeRO-3; an order that differs between them would mix the weights up."""
    model = build_model(config(train={"mode": mode}), CPU)
    trained = {id(value): number for number, value in enumerate(p for p in model.parameters() if p.requires_grad)}
    order = []

    def noting(parameter):
        order.append(trained[id(parameter)])
        return parameter.detach()

    monkeypatch.setattr(weights, "gathered", noting)
    gather_weights(model, Processes(0, 1, CPU))
    assert len(order) == len(trained) and order == sorted(order)


def test_one_process_decomposes_for_all_and_all_have_the_same_heads(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config()))
    done = run_to_end(1, Path(__file__).with_name("heads_on_two_processes.py"), path)
    assert done.returncode == 0, done.stderr[-3000:]
    (first, heads, number), (second, other_heads, other_number) = json.loads(done.stdout.splitlines()[-1])
    assert (first, second) == (4, 0)
    assert heads == other_heads
    assert number == other_number  # what is drawn later is the same, too

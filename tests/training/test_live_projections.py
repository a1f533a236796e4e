"""Supervision of the model's own queries and keys is the loss on what its attention projects, with all gradients."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.runs import run_to_end

from gasp_fast.backbones.tiny import TinyConfig, build_tiny
from gasp_fast.collator import Collator
from gasp_fast.config.loader import to_yaml
from gasp_fast.evaluation.evaluated_model import load_evaluated_model
from gasp_fast.loss.function import gasp_loss
from gasp_fast.run_folder import HEADS
from gasp_fast.supervision.geometric import GeometricSupervision
from gasp_fast.supervision.heads import HeadsConfig
from gasp_fast.supervision.live_projections import LiveProjections
from gasp_fast.train import main, train
from gasp_fast.training.distributed import Processes
from gasp_fast.training.gasp import Gasp
from gasp_fast.training.loop import TrainingLoop
from gasp_fast.training.model import build_model
from gasp_fast.training.stream import SampleStream, Share
from gasp_fast.training.weights import gather_weights, read_weights, write_weights

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")
KINDS = [
    {"kind": "tied"},
    {"kind": "qk"},
    {"kind": "qk", "attention_heads": "groups"},
    {"kind": "correspondence_and_qk", "attention_heads": "groups", "layers": "1-2"},
]


@pytest.fixture(scope="session")
def grouped_model(tmp_path_factory):
    """A Qwen of 4 query heads and 2 key heads."""
    shape = TinyConfig(model_type="qwen2_5_vl", hidden_size=64, frame_size=112, query_heads=4, key_heads=2, layers=3)
    return build_tiny(tmp_path_factory.mktemp("grouped") / "model", shape)


def with_random_adapters(model):
    """B is zero in new adapters: then nothing could be told about the gradient of A."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return model


def batch_of(config, model, positions=(0, 1)):
    stream = SampleStream(config.data)
    return Collator(model.backbone)([stream[position] for position in positions])


def plain_live_losses(model, batch, heads):
    """The loss of each supervised layer by plain autograd, on what the model's own projections put out in its pass."""
    matches, positions = batch["matches"], batch["visual_positions"]
    inputs = {name: value for name, value in batch.items() if name not in ("matches", "visual_positions", "labels")}
    shape, projected, handles = model.backbone.attention_shape, {}, []
    for layer in set(model.supervision.layers):
        attention = model.backbone.attention(model.model, layer)
        for name in "qk":

            def keep(_, __, output, place=(layer, name)):
                projected[place] = output.flatten(0, 1)[positions].flatten(1)  # [N, heads * head_dim]

            last = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")
            handles.append(last.register_forward_hook(keep))
    model.model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    losses = []
    for layer in sorted(set(model.supervision.layers)):
        q = projected[layer, "q"].view(-1, shape.query_heads, shape.head_dim)
        k = projected[layer, "k"].view(-1, shape.key_heads, shape.head_dim)
        group = shape.query_heads // shape.key_heads
        if heads["kind"] == "tied":
            pairs = [(q.flatten(1), q.flatten(1))]
        elif heads.get("attention_heads") == "groups":
            pairs = [(q[:, g * group : (g + 1) * group].mean(1), k[:, g]) for g in range(shape.key_heads)]
        elif group == 1:
            pairs = [(q.flatten(1), k.flatten(1))]
        else:
            pairs = [(q.mean(1), k.mean(1))]
        parts = [gasp_loss(a[None], matches, keys=b[None], backend="torch", return_metrics=True) for a, b in pairs]
        losses.append((sum(part.loss for part in parts) / len(parts), [float(part.metrics.pck[0]) for part in parts]))
    return losses


@pytest.mark.parametrize("checkpointing", ["off", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("heads", KINDS[:3], ids=str)
@pytest.mark.parametrize("model", ["grouped", "llava_next_video"])
def test_a_step_is_the_plain_loss_on_the_models_projections(config, grouped_model, model, heads, mode, checkpointing):
    if model == "grouped":
        compare_steps(config, "qwen2_5_vl", heads, mode, checkpointing, model={"source": str(grouped_model)})
    else:
        compare_steps(config, model, heads, mode, checkpointing)


@pytest.mark.parametrize(("heads", "mode"), [(KINDS[0], "full"), (KINDS[2], "full"), (KINDS[1], "lora")], ids=str)
def test_queries_and_keys_are_compared_behind_the_norms_of_their_heads(config, heads, mode):
    compare_steps(config, "qwen3_vl", heads, mode, "non_reentrant")


def test_norms_of_all_heads_at_once_are_refused():
    attention = torch.nn.Module()
    attention.q_proj, attention.q_norm = torch.nn.Linear(8, 32), torch.nn.RMSNorm(32)
    with pytest.raises(
        ValueError, match=r"q_norm of Module has weights \[32\], but only norms of single heads, \[16\]"
    ):
        LiveProjections(0, attention, 16, "tied")


def compare_steps(config, family, heads, mode, checkpointing, **parts):
    parts |= {"heads": heads, "loss": {"lm_weight": 0.0}}
    reference = with_random_adapters(build_model(config(family, train={"mode": mode}, **parts), CPU)).train()
    for name, parameter in reference.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data.uniform_(0.2, 2)
    batch = batch_of(config(family, **parts), reference)
    losses = plain_live_losses(reference, batch, heads)
    expected = sum(loss for loss, _ in losses) / len(losses)
    expected.backward()

    settings = config(family, train={"mode": mode, "checkpointing": checkpointing}, **parts)
    streamed = with_random_adapters(build_model(settings, CPU)).train()
    streamed.load_state_dict(reference.state_dict())
    out = streamed(**batch)
    out["loss"].backward()
    torch.testing.assert_close(out["loss"], expected, rtol=1e-5, atol=1e-6)
    for pck, (_, of_parts) in zip(out["pck"].tolist(), losses, strict=True):
        assert pck == pytest.approx(sum(of_parts) / len(of_parts), rel=1e-5)
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in streamed.named_parameters() if p.grad is not None}
    assert any("q_proj" in name and gradient.any() for name, gradient in wanted.items())
    assert any("k_proj" in name and gradient.any() for name, gradient in wanted.items())
    assert any("q_norm" in name and gradient.any() for name, gradient in wanted.items()) == (
        mode == "full" and family == "qwen3_vl"
    )
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=2e-6, msg=name)
    for name in found.keys() - wanted.keys():
        assert not found[name].any(), name


def test_both_kinds_are_averaged_over_all_that_is_supervised(config, grouped_model):
    model = {"source": str(grouped_model)}
    both = build_model(config(model=model, heads=KINDS[3], loss={"lm_weight": 0.0}), CPU)
    heads = build_model(config(model=model, heads={"layers": "1-2"}, loss={"lm_weight": 0.0}), CPU)
    live = build_model(config(model=model, heads={**KINDS[3], "kind": "qk"}, loss={"lm_weight": 0.0}), CPU)
    batch = batch_of(config(model=model), both)
    with torch.no_grad():
        together, (first, second) = both(**batch), (heads(**batch), live(**batch))
    assert both.supervision.layers == [0, 1, 0, 1]
    torch.testing.assert_close(together["loss"], (first["loss"] + second["loss"]) / 2)
    for name in ("corr", "depth", "pck", "cosine"):
        torch.testing.assert_close(together[name], torch.cat([first[name], second[name]]))


@pytest.mark.parametrize("heads", KINDS, ids=str)
def test_a_run_learns_resumes_and_is_evaluated(config, tmp_path, heads, monkeypatch, capsys):
    """Six steps are three and three; the projections get no weights of their own, in files or in groups."""
    train_part = {"steps": 6, "learning_rate": 2e-3, "warmup": 0.0}
    whole = config(heads=heads, train=train_part, run={"out": str(tmp_path / "whole"), "save_every": 3})
    train(whole)
    again = config(heads=heads, train=train_part, run={"out": str(tmp_path / "again"), "save_every": 3})
    train(replace(again, run=replace(again.run, resume=str(tmp_path / "whole/checkpoint-3"))))
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "again")
    ]
    assert [line["loss"] for line in logs[1]] == [line["loss"] for line in logs[0]][-len(logs[1]) :]
    own = heads["kind"] == "correspondence_and_qk"
    assert (tmp_path / "whole/checkpoint-6" / HEADS).exists() == own
    evaluated = load_evaluated_model(tmp_path / "whole")
    assert (evaluated.heads is not None) == own
    names = [name for name, _ in build_model(whole, CPU).named_parameters()]
    assert len(names) == len(set(names)) and any(name.startswith("supervision.") for name in names) == own


def test_weights_are_saved_and_read(config, tmp_path):
    settings = config(heads={"kind": "qk"})
    model = with_random_adapters(build_model(settings, CPU))
    write_weights(model, tmp_path, gather_weights(model, Processes(0, 1, CPU)))
    read_weights(fresh := build_model(settings, CPU), tmp_path)
    for (name, one), (_, other) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.slow
@pytest.mark.parametrize("division", ["ddp", "zero1", "zero2"])
def test_the_gradient_is_the_same_on_two_processes(config, tmp_path, division):
    settings = config(
        heads=KINDS[3], train={"steps": 2, "batch_size": 4, "clip": 1e9, "warmup": 0.0, "checkpointing": "full"}
    )
    gasp = Gasp(settings, SampleStream(settings.data), model=build_model(settings, CPU))
    loop = TrainingLoop(gasp, Share.of(settings.train, 0, 1), 2, Processes(0, 1, CPU))
    record = loop.try_step()
    state = loop.state.optimizer.state
    expected = {
        name: state[p]["exp_avg"] / 0.1 for name, p in loop.objective.model.named_parameters() if p.requires_grad
    }
    preset = None if division == "ddp" else str(REPOSITORY / f"configs/deepspeed/{division}.json")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(replace(settings, deepspeed=preset)))
    done = run_to_end(1, Path(__file__).with_name("gradients_of_a_step.py"), "2", path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(Path(settings.run.out) / "gradient.pt", weights_only=True)
    size = sum(float(gradient.norm()) ** 2 for gradient in expected.values()) ** 0.5
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) < 1e-5 * size, name
    log = json.loads((Path(settings.run.out) / "loss.json").read_text())
    assert log["loss"] == pytest.approx(record["loss"], rel=1e-5)


def test_zero_3_is_refused_before_anything_is_loaded(config, tmp_path, capsys):
    settings = replace(config(heads={"kind": "qk"}), deepspeed=str(REPOSITORY / "configs/deepspeed/zero3.json"))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings))
    assert main([str(path)]) == 1
    line = capsys.readouterr().err
    assert "heads.kind = qk" in line and "zero2.json" in line and line.count("\n") == 1


def test_settings_that_contradict_each_other_are_refused(config):
    with pytest.raises(ValueError, match=r"heads.attention_heads = groups .* heads.kind is tied"):
        HeadsConfig(kind="tied", attention_heads="groups")
    with pytest.raises(ValueError, match=r"learnable_temperature .* heads.kind = qk"):
        config(heads={"kind": "qk"}, loss={"learnable_temperature": True})
    with pytest.raises(ValueError, match=r"train.mode = 'heads' .* heads.kind = correspondence_and_qk trains"):
        config(heads={"kind": "correspondence_and_qk"}, train={"mode": "heads"})
    with pytest.raises(ValueError, match="no layer is supervised"):
        GeometricSupervision(None)


def test_projections_stay_the_models(config):
    model = build_model(config(heads={"kind": "qk"}), CPU)
    assert not list(model.supervision.parameters())
    assert all(isinstance(one, LiveProjections) for one in model.supervision.by_layer.values())

"""G²VLM on a GPU: each stage trains, is evaluated and reconstructs, and a CPU agrees with it in fp32."""

import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from support.gpu import CPU, DEVICE, ON_A_GPU, TERMS, assert_agree, assert_finite, step_on
from support.runs import log_of, write_config
from support.surfaces import drawn_surfaces, fused_equals_plain, results
from support.tiny_g2vlm import StandInHeads, drawn, tiny_g2vlm

from gasp_fast import cli
from gasp_fast.backbones import load_backbone
from gasp_fast.g2vlm import ReconChat, chat_with_recon, recon
from gasp_fast.g2vlm.cache import Cache
from gasp_fast.g2vlm.collator import normalised
from gasp_fast.g2vlm.dense import dense_terms
from gasp_fast.g2vlm.experts import ExpertsConfig
from gasp_fast.g2vlm.model import G2VLM
from gasp_fast.g2vlm.objective import G2Objective
from gasp_fast.train import train
from gasp_fast.training.distributed import Processes

pytestmark = ON_A_GPU
STAGES = {
    "geometry": {"train": {"mode": "geometric"}},
    "text": {"train": {"mode": "semantic"}, "loss": {"text_weight": 1.0, "geometry_weight": 0.0}},
    "both": {"train": {"mode": "both"}, "loss": {"text_weight": 1.0}},
    "both with GASP": {"train": {"mode": "both"}, "loss": {"text_weight": 1.0}, "gasp": {"weight": 1.0}},
}


@pytest.fixture(params=["bf16", "fp32"])
def dtype(request):
    """What the model computes in; on a GPU it is bf16."""
    return request.param


@contextmanager
def computing_in(dtype):
    def autocast(self, device):
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(G2VLM, "autocast", autocast)
        yield


@pytest.fixture
def stage(recipe, questions):
    def make(name, **groups):
        changed = STAGES[name]
        steps = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "tokens_at_once": 10_000}
        made = {**changed, **groups, "train": {**steps, **changed["train"], **groups.get("train", {})}}
        return recipe(None if name == "geometry" else str(questions), **made)

    return make


@pytest.mark.parametrize("name", STAGES)
def test_a_cpu_agrees_with_the_first_step(stage, name, dtype):
    objective = G2Objective(stage(name))
    objective.build(CPU)
    processes = Processes(0, 1, CPU)
    share = objective.share(processes)
    share = dataclasses.replace(share, deal=objective.deal(share, processes))
    batch = next(iter(objective.loader(share, 1, 0, False)))
    batch.pop("skipped", None)
    model = objective.model
    drawn(model.model, noise=0.03).train()  # new heads predict the same of all frames

    def step(device):
        return model(**{name: value.to(device) for name, value in batch.items()})

    with computing_in("fp32"):
        expected = step_on(CPU, model, step)
    assert expected["gradient"].any()
    with computing_in(dtype):
        assert_agree(step_on(DEVICE, model, step), expected, dtype)


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_trains_and_resumes(stage, name):
    recipe = stage(name, train={"steps": 2}, run={"save_every": 1}, experts={"checkpointing": "full"})
    train(recipe)
    out = Path(recipe.run.out)
    (out / "checkpoint-2").rename(out.with_name("whole"))
    first = log_of(out)
    train(recipe)
    for before, after in zip(first, log_of(out), strict=True):
        assert_finite(after)
        assert after["loss"] == pytest.approx(before["loss"], rel=2e-3)


@pytest.fixture
def run(stage) -> Path:
    recipe = stage("geometry")
    assert cli.main(["train", str(write_config(recipe, Path(recipe.run.out).with_suffix(".yaml")))]) == 0
    return Path(recipe.run.out)


def test_a_run_is_evaluated(run, assets, tmp_path):
    sizes = ["--frames", "3", "--stride", "2", "--side", "28", "--points", "300", "--sequences", "2", "--pictures", "1"]
    where = ["--model", str(run), "--scenes", str(assets.scenes), "--out", str(tmp_path / "report")]
    assert cli.main(["geometry", *where, *sizes]) == 0
    report = (tmp_path / "report" / "report.json").read_text()
    assert "NaN" not in report and json.loads(report)["sequences"] == 2


def test_photographs_are_reconstructed(run, assets, tmp_path):
    photographs = sorted(map(str, (assets.scenes / "scene-0" / "color").iterdir()))[:3]
    assert cli.main(["reconstruct", "--model", str(run), "--out", str(tmp_path / "out"), *photographs]) == 0
    assert (tmp_path / "out" / "cloud.ply").stat().st_size > 0


@pytest.fixture
def backbone(assets):
    return load_backbone(assets.models["qwen2_vl"])


@pytest.fixture
def model(backbone):
    torch.manual_seed(0)
    return drawn(G2VLM(backbone.load_model(torch.float32), tiny_g2vlm().encoder, StandInHeads(), ExpertsConfig()))


def photographs():
    return list(np.random.default_rng(0).integers(0, 256, (3, 60, 90, 3), dtype=np.uint8))


def test_a_reconstruction_is_that_of_a_cpu(model, dtype):
    with computing_in("fp32"):
        expected = recon(model, photographs(), side=56)
    with computing_in(dtype):
        found = recon(model.to(DEVICE), photographs(), side=56)
    for name in ("local", "world", "rotation", "translation"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert np.isfinite(ours).all()
        assert np.linalg.norm(ours - theirs) <= TERMS[dtype] * np.linalg.norm(theirs), name


def test_a_chat_with_a_cache_says_what_recomputing_everything_says(model, backbone, dtype):
    """In bf16 a rounding may decide between words that are equally likely: there, the logits are compared."""
    model.to(DEVICE)
    question, count = "Where is the red chair?", 6
    with computing_in(dtype):
        chat = ReconChat(model, backbone, photographs(), side=56)
        questions = chat.questions([{"role": "user", "content": question}])
        seen, text = chat_with_recon(model, backbone, photographs(), question, side=56, max_new_tokens=count)
        pixels = normalised(torch.from_numpy(seen.images).movedim(-1, 1)[None]).to(DEVICE)
        logits, tokens = cached_and_recomputed(model, pixels, questions, count)
        assert chat.ask(question, count) == text
    for cached, again in logits:
        assert (cached - again).norm() <= TERMS[dtype] * again.norm()
    if dtype == "fp32":
        assert text == backbone.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@torch.no_grad()
def cached_and_recomputed(model, pixels, questions, count):
    """Logits of each token, by both; and the tokens, each the likeliest."""
    cache, tokens, logits = Cache(len(model.experts.layers)), [], []
    model.states(pixels, cache=cache)
    for _ in range(count):
        new = torch.tensor([tokens], dtype=torch.long, device=DEVICE).view(1, -1)
        ids = torch.cat([questions.input_ids, new], 1)
        with model.autocast(DEVICE):
            cached = model.read(new[:, -1:] if tokens else questions, cache)
            states, _ = model.states(pixels, dataclasses.replace(questions, input_ids=ids, labels=ids))
            again = model.lm_head(states.tail[:, -1])
        logits.append((cached.float(), again.float()))
        tokens.append(int(cached.argmax()))
    return logits, tokens


# ---- the fused losses ------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 2, 2), (3, 2, 9, 11), (2, 4, 70, 84), (2, 3, 28, 518)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_fused_losses_are_those_of_plain_pytorch(shape):
    fused_equals_plain(DEVICE.type, drawn_surfaces(0, *shape, noise=0.02))


def test_the_fused_losses_are_the_same_to_the_last_bit_when_repeated():
    arguments = drawn_surfaces(1, 2, 4, 70, 84, noise=0.02)
    first, second = (results(dense_terms, arguments, DEVICE.type, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)

"""`train.mode: heads`: the heads learn on a frozen model, and nothing else changes, is saved or can be exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gasp_fast.backbones import load_backbone
from gasp_fast.evaluation.evaluated_model import load_evaluated_model
from gasp_fast.export import export
from gasp_fast.train import train
from gasp_fast.training.model import build_model

ROOT = Path(__file__).parents[2]
HEADS_ONLY: dict[str, Any] = {"mode": "heads", "steps": 6, "learning_rate": 1e-3, "checkpointing": "full"}


@pytest.fixture
def run(config, family) -> Path:
    trained = config(family, mixed=True, train={**HEADS_ONLY, "batch_size": 2})
    train(trained)
    return Path(trained.run.out)


def test_only_heads_are_trained_and_nothing_is_kept_or_recomputed_for_backward(config, family):
    """Frozen weights have the model's own dtype, as under adapters."""
    model = build_model(config(family, train=HEADS_ONLY, model={"dtype": "bf16"}), torch.device("cpu"))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("supervision.") for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.bfloat16}
    layers = model.backbone.decoder_layers(model.model)
    assert not any(layer.gradient_checkpointing for layer in layers)


def test_a_checkpoint_holds_the_heads_and_is_evaluated_on_the_base_model(run, assets, family):
    (checkpoint,) = run.glob("checkpoint-*")
    weights = {path.name for path in checkpoint.glob("*.safetensors")}
    assert weights == {"heads.safetensors", "optimizer-1.safetensors", "random.safetensors"}
    evaluated = load_evaluated_model(run)
    assert evaluated.heads_origin == "trained"
    base = load_backbone(assets.models[family]).load_model(torch.float32).state_dict()
    found = evaluated.model.state_dict()
    assert found.keys() == base.keys() and all(torch.equal(found[name], base[name]) for name in base)
    initial = load_evaluated_model(assets.models[family], initial_heads=True).heads.state_dict()
    stored = load_file(checkpoint / "heads.safetensors")
    for name, value in evaluated.heads.state_dict().items():
        assert torch.equal(value, stored[name])
        if name.endswith("weight"):
            assert not torch.equal(value, initial[name]), f"{name} has not learned"


def test_there_is_nothing_to_export(run, assets, family, tmp_path):
    with pytest.raises(ValueError, match="there is nothing to export, use its base model") as caught:
        export(run, tmp_path / "out")
    assert str(assets.models[family]) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_run_resumes_where_it_stopped(config, tmp_path):
    def trained(name: str, *sizes: int) -> dict[str, torch.Tensor]:
        for step in sizes:
            train(config(train={**HEADS_ONLY, "batch_size": 2}, run={"out": str(tmp_path / name), "save_every": step}))
            if step != sizes[-1]:  # as if it had been killed after the first checkpoint
                for later in (tmp_path / name).glob("checkpoint-*"):
                    if later.name != f"checkpoint-{step}":
                        for file in later.iterdir():
                            file.unlink()
                        later.rmdir()
        return load_file(tmp_path / name / "checkpoint-6" / "heads.safetensors")

    whole, resumed = trained("whole", 100), trained("resumed", 3, 100)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_zero_3_is_refused_in_one_line(config):
    recipe = replace(config(train=HEADS_ONLY), deepspeed=str(ROOT / "configs" / "deepspeed" / "zero3.json"))
    with pytest.raises(ValueError, match=r"zero3\.json' is ZeRO-3, .* use configs/deepspeed/zero2\.json") as caught:
        train(recipe)
    assert "\n" not in str(caught.value)


def test_heads_cannot_be_trained_without_a_loss_for_them(config):
    with pytest.raises(ValueError, match=r"train\.mode = 'heads' .* set loss\.corr_weight or loss\.depth_weight"):
        config(train={"mode": "heads"}, loss={"corr_weight": 0.0, "depth_weight": 0.0})

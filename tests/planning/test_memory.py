"""Memory agrees with what autograd saves in the real modules, and with a calculation by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support import liger_stand_in
from support.planning import ROOT, plan_of, setup_of, zero

from gasp_fast.backbones.adapters import AdapterConfig, add_adapters
from gasp_fast.backbones.liger import use_liger
from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.memory import activation_bytes, memory_by_purpose, state_bytes
from gasp_fast.planning.shapes import ModelShape
from gasp_fast.planning.training_setup import SequenceSize, Sharding


@pytest.mark.parametrize(("mode", "liger"), [("lora", False), ("lora", True), ("full", False)])
def test_activations_are_those_that_autograd_saves(
    small: tuple[Any, ModelShape],
    inputs: dict[str, torch.Tensor],
    mode: str,
    liger: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone, shape = small
    setup = setup_of(f"train.mode={mode}", "lora.rank=8", f"model.liger={'true' if liger else 'false'}", shape=shape)
    model: Any = backbone.load_model(torch.float32 if mode == "full" else torch.bfloat16)
    if liger:
        liger_stand_in.install(monkeypatch)
        use_liger(backbone, model)
    if mode == "lora":
        model = add_adapters(backbone, model, AdapterConfig(rank=8))
    tokens = inputs["input_ids"].shape[1]
    layer: Any = backbone.decoder_layers(model)[2]
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    alive, inside = [], [False]  # `alive`: freed storage would be reused, and counted once

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        at = tensor.untyped_storage().data_ptr()
        # Copies of weights that autocast made do not grow with the sequence: counted elsewhere.
        if inside[0] and at not in weights and tokens in tensor.shape:
            saved[at] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    layer.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    layer.register_forward_hook(lambda *_: inside.__setitem__(0, False))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()(**inputs)
    rotations = 2 * (4 if mode == "full" else 2) * shape.head_dim  # shared by all layers
    assert activation_bytes(setup) == pytest.approx(sum(saved.values()) / tokens - rotations, rel=0.00002)


def test_a_frozen_model_saves_no_activations_and_has_no_gradients() -> None:
    """Of the heads alone: 4 bytes of weight, 4 of gradient, 8 of the optimiser for each number."""
    setup, heads = setup_of("train.mode=heads", "deepspeed=null", "train.checkpointing=full"), 359_812_096
    longest = SequenceSize(tokens=14_000, visual=13_800, tracked=13_800, anchors=500, labelled=0, frames=24)
    memory = memory_by_purpose(setup, longest, 1, Assumptions())
    assert setup.parameters.trained == heads and memory["frozen weights"] == 2 * 8_292_166_656
    assert memory["trained weights"] == memory["gradients"] == memory["kept by heads"] == 4 * heads
    assert memory["optimiser"] == 8 * heads and memory["saved activations"] == 0


def test_memory_of_weights_gradients_and_optimiser_by_hand() -> None:
    trained = 80_740_352 + 359_812_096
    one = state_bytes(setup_of(zero("zero1")), 32)
    assert one["frozen weights"] == 2 * 8_292_166_656
    assert one["trained weights"] == 4 * trained + 2 * 80_740_352
    assert one["gradients"] == 4 * trained
    assert one["optimiser"] == pytest.approx(12 * trained / 32)
    assert state_bytes(setup_of(zero("zero2")), 32)["gradients"] == pytest.approx(4 * trained / 32)
    three = state_bytes(setup_of(zero("zero3")), 32)
    assert three["frozen weights"] == pytest.approx(2 * 8_292_166_656 / 32) and three["gathered weights"] == 2e9
    assert state_bytes(setup_of("deepspeed=null"), 32)["optimiser"] == 8 * trained
    assert state_bytes(setup_of(zero("zero2_offload")), 32)["optimiser"] == 0


def test_each_stage_of_zero_needs_less_memory_than_the_one_before() -> None:
    presets = ("deepspeed=null", zero("zero1"), zero("zero2"), zero("zero3"))
    needed = [sum(state_bytes(setup_of(preset), 32).values()) for preset in presets]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == 4


def test_a_plan_contains_the_memory_of_weights_gradients_and_optimiser() -> None:
    assert state_bytes(setup_of(), 32).items() <= plan_of(gpus=32).memory.items()


def test_a_preset_gives_its_stage_and_its_offloading() -> None:
    presets = (ROOT / "configs" / "deepspeed").glob("*.json")
    of = {path.stem: Sharding.of(json.loads(path.read_text())) for path in presets}
    assert (of["zero1"].stage, of["zero3"].stage, Sharding.of(None).deepspeed) == (1, 3, False)
    assert of["zero3_offload"].weights_on_cpu and not of["zero2_offload"].weights_on_cpu
    assert of["zero2_offload"].optimiser_on_cpu and not of["zero2"].optimiser_on_cpu


def test_where_auto_keeps_a_layer_every_measured_step_would_have_fit() -> None:
    """The frozen tower had a graph then, which took some gigabytes; the estimate knows none. The margin covers that."""
    assumptions, folder = Assumptions(), ROOT / "benchmarks" / "results" / "h200-2026-11-26"
    records = [case for name in "ab" for case in json.loads((folder / f"step-{name}.json").read_text())["cases"]]
    measured = [record for record in records if record.get("peak_memory")]
    assert len(measured) >= 10
    for record in measured:
        visual = record["frames"] * record["frame_tokens"]
        size = SequenceSize(
            frames=record["frames"],
            tokens=round(record["tokens_per_sequence"]),
            visual=visual,
            tracked=visual if record["geometry"] else 0,
        )
        setup = setup_of(
            "deepspeed=null",
            f"lora.rank={128 if record['family'] == 'qwen2_5_vl' else 512}",
            f"train.micro_batch_size={record['at_once']}",
            f"train.checkpointing={record['checkpointing']}",
            f"heads.compute={record['heads']}",
            f"model.liger={'true' if record['liger'] else 'false'}",
            *([] if record["geometry"] else ["loss.corr_weight=0", "loss.depth_weight=0"]),
            shape=ModelShape(**record["shape"]),
        )
        estimate = sum(memory_by_purpose(setup, size, 1, assumptions).values())
        allowed = estimate / (1 - assumptions.margin)  # the least memory with which auto would choose this setup
        assert record["peak_memory"] <= allowed < 1.35 * record["peak_memory"], record["name"]

"""What the cost model promises: counts that agree with the real modules and with a pencil, and directions that hold."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from gasp_fast.backbones import Conversation, load_backbone, tiny
from gasp_fast.cli import plan as command
from gasp_fast.config.loader import load_config
from gasp_fast.planning.cost_model import (
    GPUS,
    PAPER_RATE,
    Plan,
    Sharding,
    activation_bytes,
    communication_bytes,
    expected_slowest,
    make_plan,
    tokens_at_rate,
)
from gasp_fast.planning.shapes import (
    LLAVA_NEXT_VIDEO_7B,
    PATCHES,
    QWEN2_5_VL_7B,
    ModelShape,
    shape_from_config,
    shape_of,
)
from gasp_fast.planning.workload import Assumptions, Sequence, operations, parameters, sequences_of
from gasp_fast.supervision.heads import CorrespondenceHeads
from gasp_fast.training.config import TrainConfig
from gasp_fast.training.model import build_model
from gasp_fast.training.stream import SampleStream, Share, make_loader
from gasp_fast.training.throughput import OperationCount, sequences_of_batch

ROOT = Path(__file__).parents[2]
QWEN = load_config(
    TrainConfig, ROOT / "configs" / "qwen2_5_vl_7b.yaml", [f"deepspeed={ROOT}/configs/deepspeed/zero1.json"]
)
H200 = GPUS["h200"]


def changed(*overrides: str, base: TrainConfig = QWEN) -> TrainConfig:
    """The Qwen recipe with overrides."""
    name = ROOT / "configs" / "qwen2_5_vl_7b.yaml"
    return load_config(TrainConfig, name, [f"deepspeed={base.deepspeed}", *overrides])


def zero(stage: str) -> str:
    return f"deepspeed={ROOT}/configs/deepspeed/{stage}.json"


def planned(*overrides: str, gpus: int = 32, gpu: str = "h200", **more: Any) -> Plan:
    return make_plan(changed(*overrides), QWEN2_5_VL_7B, gpus, GPUS[gpu], **more)


# ---- counts against the real modules --------------------------------------------------------------------------------


def test_the_built_in_shapes_are_those_of_the_real_models() -> None:
    from transformers import AutoConfig

    qwen = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config={
            "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "intermediate_size": 18944, "vocab_size": 152064,
        },
        vision_config={"hidden_size": 1280, "out_hidden_size": 3584},
        tie_word_embeddings=False,
    )  # fmt: skip
    assert shape_from_config(qwen) == QWEN2_5_VL_7B
    llava = AutoConfig.for_model(
        "llava_next_video",
        text_config={
            "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32064,
        },
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
        },
    )  # fmt: skip
    assert shape_from_config(llava) == LLAVA_NEXT_VIDEO_7B


@pytest.fixture(scope="session", params=["qwen2_5_vl", "llava_next_video"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelShape]:
    """A tiny backbone of each family, and its shape."""
    config = tiny.TinyConfig(model_type=request.param, hidden_size=256)
    folder = tiny.build_tiny(tmp_path_factory.mktemp("plan") / request.param, config)
    return load_backbone(folder), shape_of(str(folder))


def conversation(backbone: Any, frames: int = 4) -> dict[str, torch.Tensor]:
    pictures = [np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in range(frames)]
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "There are 3."}]
    inputs = backbone.encode([Conversation(pictures, messages)]).inputs
    return {name: value for name, value in inputs.items() if name != "labels"}


def test_parameters_are_those_that_are_really_trained(small: tuple[Any, ModelShape]) -> None:
    backbone, shape = small
    model: Any = backbone.load_model(torch.float32)
    count = parameters(changed("lora.rank=5", "heads.layers=2-4"), shape)
    assert count["frozen"] == sum(p.numel() for p in model.parameters())
    heads = CorrespondenceHeads.from_query_projections({n: backbone.query_projection(model, n) for n in (1, 2, 3)})
    assert count["heads"] == sum(p.numel() for p in heads.parameters())
    adapted = get_peft_model(model, LoraConfig(r=5, target_modules=backbone.lora_targets))
    assert count["adapters"] == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    full = parameters(changed("train.mode=full"), shape)
    assert (full["frozen"], full["model"], full["adapters"]) == (0, count["frozen"], 0)


def test_forward_operations_are_those_that_torch_counts(small: tuple[Any, ModelShape]) -> None:
    backbone, shape = small
    model: Any = backbone.load_model(torch.float32, attention="eager").eval()  # whose products torch can count
    inputs = conversation(backbone)
    tokens = inputs["input_ids"].shape[1]
    visual = int((inputs["input_ids"] == backbone.visual_token_id).sum())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    counted = counter.get_flop_counts()
    totals = {name: sum(of.values()) for name, of in counted.items()}
    language = next(value for name, value in totals.items() if name.endswith("model.language_model"))
    sequence = Sequence(
        share=1.0, frames=4, tokens=tokens, visual=visual, tracked=0, anchors=0, labelled=tokens
    )  # fmt: skip
    ours = operations(changed(), shape, sequence)
    # torch counts the whole square of attention; the mask makes half of it unnecessary.
    assert ours["decoder"].forward + 2 * ours["attention"].forward == pytest.approx(language, rel=1e-3)
    everything = totals["Global"]
    assert ours["lm head"].forward == 2 * tokens * shape.vocabulary * shape.hidden
    vision = everything - language - ours["lm head"].forward
    assert ours["vision"].forward == pytest.approx(vision, rel=0.08)


class WholeCounter(FlopCounterMode):
    """Counts without asking which module is at work: torch's way to know that breaks on gradients taken in forward."""

    class _Nobody(nullcontext[None]):
        parents = frozenset({"Global"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.mod_tracker: Any = self._Nobody()


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_operations_of_a_training_step_are_those_that_torch_counts(config: Any, family: str, mode: str) -> None:
    """Forward and backward, heads and geometric loss among them, of what the real loader makes."""
    recipe = config(
        family,
        mixed=True,
        train={"mode": mode, "batch_size": 2, "micro_batch_size": 2},
        loss={"backend": "torch"},
        model={"attention": "eager"},
    )
    model = build_model(recipe, torch.device("cpu"))
    count = OperationCount(recipe, model)  # the one of the trainer, which makes MFU of it
    stream = SampleStream(recipe.data)
    batch = next(iter(make_loader(recipe.data, stream, model.backbone, Share(0, 1, 2, 2), 1, pin_memory=False)))
    sequences = sequences_of_batch(batch, model.backbone.visual_token_id, count.shape.frame_tokens)
    assert sum(s.visual for s in sequences) == int((batch["input_ids"] == model.backbone.visual_token_id).sum())
    assert [s.frames for s in sequences] == ([2, 3] if family == "qwen2_5_vl" else [2, 2])  # LLaVA: as many in each
    assert sum(s.anchors > 0 for s in sequences) == sum(s.labelled > 0 for s in sequences) == 1
    with WholeCounter(display=False) as counter:
        model.train()(**batch)["loss"].backward()
    ours = [operations(recipe, count.shape, sequence) for sequence in sequences]
    assert count(sequences) == sum(part.needed for of in ours for part in of.values())
    masked = sum(of["attention"].needed for of in ours)  # torch counts the whole square of attention
    # LLaVA reads the last but one layer of its tower, a third of this one's: no gradient enters the last.
    unread = 0.0
    if (family, mode) == ("llava_next_video", "full"):
        shape, patches = count.shape, PATCHES * sum(s.visual for s in sequences)
        of_frame = PATCHES * count.shape.frame_tokens
        unread = 2 * patches * (2 * shape.vision_block_weights + 4 * of_frame * shape.vision_hidden)
    assert counter.get_total_flops() == pytest.approx(count(sequences) + masked - unread, rel=0.03)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_activations_are_those_that_autograd_saves(small: tuple[Any, ModelShape], mode: str) -> None:
    backbone, shape = small
    config = changed(f"train.mode={mode}", "lora.rank=8")
    model: Any = backbone.load_model(torch.float32 if mode == "full" else torch.bfloat16)
    if mode == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules=backbone.lora_targets))
    inputs = conversation(backbone)
    tokens = inputs["input_ids"].shape[1]
    layer: Any = backbone.decoder_layers(model)[2]
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    alive, inside = [], [False]  # `alive`: freed storage would be handed out again, and counted once

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
    assert activation_bytes(config, shape) == pytest.approx(sum(saved.values()) / tokens - rotations, rel=0.00002)


# ---- counts against a pencil ----------------------------------------------------------------------------------------


def test_parameters_of_the_7b_recipes_by_hand() -> None:
    count = parameters(QWEN, QWEN2_5_VL_7B)
    # q and o: 3584 -> 3584; k and v: 3584 -> 512. Heads 3584 -> 1792 -> 3584 with biases.
    assert count["adapters"] == 28 * 128 * (2 * (3584 + 3584) + 2 * (3584 + 512)) == 80_740_352
    assert count["heads"] == 28 * (2 * 3584 * 1792 + 1792 + 3584) == 359_812_096
    assert count["frozen"] == 8_292_166_656


def test_operations_of_one_sequence_by_hand() -> None:
    sequence = Sequence(share=1.0, frames=2, tokens=1000, visual=900, tracked=900, anchors=100, labelled=10)
    work = operations(changed("train.checkpointing=off"), QWEN2_5_VL_7B, sequence)
    layer = 3584 * (2 * 3584 + 2 * 512 + 3 * 18944)  # weights
    assert work["decoder"].forward == 2 * 1000 * 28 * layer and work["decoder"].backward == work["decoder"].forward
    assert work["attention"].forward == 2 * 1000**2 * 3584 * 28
    assert work["heads"].total == 3 * 2 * 900 * 28 * (3584 * 1792 * 2)
    assert work["geometric loss"].total == 6 * 100 * 900 * 3584 * 28
    assert work["lm head"].forward == 2 * 10 * 3584 * 152064
    assert work["vision"].backward == 0
    assert work["attention"].needed == 3 * work["attention"].forward  # the rest is recomputation, by its own backward
    assert {name for name, part in work.items() if part.recompute} == {"attention"}


def test_memory_of_weights_and_states_by_hand() -> None:
    trained = 80_740_352 + 359_812_096
    items = planned(zero("zero1")).memory
    assert items["frozen weights"] == 2 * 8_292_166_656
    assert items["trained weights"] == 4 * trained + 2 * 80_740_352
    assert items["gradients"] == 4 * trained
    assert items["optimiser"] == pytest.approx(12 * trained / 32)
    assert planned(zero("zero2")).memory["gradients"] == pytest.approx(4 * trained / 32)
    three = planned(zero("zero3")).memory
    assert three["frozen weights"] == pytest.approx(2 * 8_292_166_656 / 32) and three["gathered weights"] == 2e9
    assert planned("deepspeed=null").memory["optimiser"] == 8 * trained
    assert planned(zero("zero2_offload")).memory["optimiser"] == 0


def test_bytes_on_the_wire_by_hand() -> None:
    trained = 4 * (80_740_352 + 359_812_096)
    assert communication_bytes(changed(zero("zero1")), QWEN2_5_VL_7B, 4) == 2 * trained
    assert communication_bytes(changed(zero("zero2")), QWEN2_5_VL_7B, 4) == 5 * trained
    frozen = 2 * 8_292_166_656
    assert communication_bytes(changed(zero("zero3")), QWEN2_5_VL_7B, 4) == 4 * (trained + 3 * (trained + frozen))


def test_the_slowest_of_two_dice_by_hand() -> None:
    dice = [(1 / 6, float(eyes)) for eyes in range(1, 7)]
    assert expected_slowest(dice, 1) == pytest.approx(3.5)
    assert expected_slowest(dice, 2) == pytest.approx(161 / 36)
    assert expected_slowest(dice, 10_000) == pytest.approx(6)


def test_an_epoch_draws_every_length_and_source_as_often_as_the_recipe_says() -> None:
    kinds = sequences_of(QWEN, 576, Assumptions())
    assert sum(kind.share for kind in kinds) == pytest.approx(1)
    scenes = [kind for kind in kinds if kind.tracked]
    assert [kind.frames for kind in scenes] == list(range(8, 25)) and sum(k.share for k in scenes) == pytest.approx(0.5)
    assert all(kind.visual == kind.frames * 576 and 0 < kind.anchors <= kind.visual for kind in scenes)
    alone = sequences_of(changed("loss.corr_weight=0", "loss.depth_weight=0"), 576, Assumptions())
    assert not any(kind.tracked or kind.anchors for kind in alone)
    # 3 epochs of 1.75 M sequences, each accompanied by a question.
    assert planned(sequences=1_750_000).steps == 1_750_000 * 3 * 2 // 128
    assert planned("train.steps=7").steps == 7


# ---- directions -----------------------------------------------------------------------------------------------------


def test_each_stage_of_zero_needs_less_memory_than_the_one_before() -> None:
    states = ("frozen weights", "trained weights", "gathered weights", "gradients", "optimiser")
    needed = []
    for preset in ("null", "zero1", "zero2", "zero3"):
        plan = planned("deepspeed=null" if preset == "null" else zero(preset))
        needed.append(sum(plan.memory[name] for name in states))
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == 4


def test_checkpointing_saves_memory_and_costs_time() -> None:
    on, off = planned(), planned("train.checkpointing=off")
    assert on.bytes_needed < off.bytes_needed and on.step_seconds > off.step_seconds
    assert off.bytes_needed > GPUS["h100"].memory > on.bytes_needed  # what makes the recipe fit 80 GB


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 400), more=st.integers(1, 200))
def test_a_higher_rank_needs_more_of_everything(rank: int, more: int) -> None:
    low, high = planned(f"lora.rank={rank}"), planned(f"lora.rank={rank + more}")
    assert low.bytes_needed < high.bytes_needed and low.step_seconds < high.step_seconds


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 700), more=st.integers(1, 200))
def test_larger_frames_need_more_of_everything(tokens: int, more: int) -> None:
    low, high = planned(frame_tokens=tokens), planned(frame_tokens=tokens + more)
    assert low.bytes_needed < high.bytes_needed and low.hours < high.hours and low.mean_tokens < high.mean_tokens


def test_more_gpus_take_less_time_and_no_fewer_gpu_hours() -> None:
    plans = [planned(gpus=gpus) for gpus in (1, 2, 8, 32, 128)]
    assert [p.hours for p in plans] == sorted((p.hours for p in plans), reverse=True)
    assert [p.gpu_hours for p in plans] == sorted(p.gpu_hours for p in plans)


def test_fewer_supervised_layers_make_geometry_cheaper_and_none_make_it_free() -> None:
    shares = [planned(f"heads.layers={layers}").geometry_share for layers in ("all", "10-18", "18")]
    assert shares == sorted(shares, reverse=True) and shares[-1] > 0
    assert planned("loss.corr_weight=0", "loss.depth_weight=0").geometry_share == 0


def test_meeting_once_a_step_costs_less_waiting_than_at_every_sequence() -> None:
    assert planned(zero("zero1")).seconds["waiting"] == pytest.approx(planned(zero("zero2")).seconds["waiting"] / 2)
    assert planned(gpus=1).seconds["waiting"] == 0


def test_no_plan_promises_more_than_the_hardware() -> None:
    for gpu in GPUS:
        plan = planned(gpu=gpu)
        assert 0 < plan.mfu < 0.6
    assert GPUS.keys() == set(command.GPU_NAMES)


def test_the_tokens_at_the_papers_rate_are_those_at_which_the_plan_reaches_it() -> None:
    most = tokens_at_rate(PAPER_RATE, QWEN, QWEN2_5_VL_7B, 32, H200, Assumptions())
    assert most is not None and round(PAPER_RATE, 1) == 4.6
    assert planned(frame_tokens=most).rate >= PAPER_RATE > planned(frame_tokens=most + 1).rate
    assert tokens_at_rate(1e9, QWEN, QWEN2_5_VL_7B, 32, H200, Assumptions()) is None


def test_a_better_efficiency_makes_its_part_faster_and_no_other() -> None:
    before, after = planned(given=Assumptions()), planned(given=replace(Assumptions(), vision=0.7))
    assert after.seconds["vision"] == pytest.approx(before.seconds["vision"] / 2)
    assert after.seconds["decoder"] == before.seconds["decoder"]


# ---- the command ----------------------------------------------------------------------------------------------------


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(ROOT / "configs" / "qwen2_5_vl_7b.yaml"), *words]))


def test_the_command_says_what_dominates_and_compares_with_the_paper(capsys: Any) -> None:
    assert run(zero("zero1"), "--gpus", "32", "--gpu", "h200") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("memory fits", "most of it is frozen weights", "GPU-hours", "more than anything else", "imply 4.6",
                  "not yet measured on a GPU", "to be the paper's 1,750,000 sequences"):  # fmt: skip
        assert words in shown


def test_a_recipe_that_does_not_fit_says_so_and_exits_with_1(capsys: Any) -> None:
    assert run(zero("zero1"), "train.checkpointing=off", "--gpu", "h100") == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_what_cannot_be_planned_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="does not divide over gpus = 48"):
        run(zero("zero1"), "--gpus", "48")
    with pytest.raises(ValueError, match="--sequences 0"):
        run("--sequences", "0")
    with pytest.raises(OSError, match="shape is not known by name"):
        run("model.source=some/other-model")
    with pytest.raises(OSError, match="zero9"):
        run("deepspeed=configs/zero9.json")


def test_a_preset_tells_its_stage_and_what_it_keeps_on_the_cpu() -> None:
    of = {path.stem: Sharding.of(str(path)) for path in (ROOT / "configs" / "deepspeed").glob("*.json")}
    assert (of["zero1"].stage, of["zero3"].stage, Sharding.of(None).deepspeed) == (1, 3, False)
    assert of["zero3_offload"].weights_on_cpu and not of["zero2_offload"].weights_on_cpu
    assert of["zero2_offload"].optimiser_on_cpu and not of["zero2"].optimiser_on_cpu

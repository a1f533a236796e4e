"""FLOPs agree with what torch counts on the real modules, and with a calculation by hand."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.families import SHIPPED
from support.planning import setup_of
from torch.utils.flop_counter import FlopCounterMode

from gasp_fast.backbones.vision_layers import MULTIPLE
from gasp_fast.planning.flops import flops_by_part, model_flops
from gasp_fast.planning.shapes import PATCHES, ModelShape
from gasp_fast.planning.step_design import FIRST_MEASURED
from gasp_fast.planning.training_setup import SequenceSize
from gasp_fast.planning.work import work_of_micro_batch
from gasp_fast.training.loader import make_loader
from gasp_fast.training.model import build_model
from gasp_fast.training.stream import SampleStream, Share
from gasp_fast.training.workload import BatchFlops


@pytest.mark.parametrize("small", SHIPPED, indirect=True)
def test_forward_flops_are_those_that_torch_counts(
    small: tuple[Any, ModelShape], inputs: dict[str, torch.Tensor]
) -> None:
    backbone, shape = small
    model: Any = backbone.load_model(torch.float32, attention="eager").eval()  # whose products torch can count
    router = 0
    if backbone.model_type == "qwen3_vl_moe":
        model.set_experts_implementation("eager")
        router = shape.layers * shape.hidden * backbone.config.text_config.num_experts  # weights, not estimated
    tokens = inputs["input_ids"].shape[1]
    visual = int((inputs["input_ids"] == backbone.visual_token_id).sum())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    totals = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    language = next(value for name, value in totals.items() if name.endswith("model.language_model"))
    size = SequenceSize(frames=4, tokens=tokens, visual=visual, tracked=0, anchors=0, labelled=tokens)
    flops = flops_by_part(setup_of(shape=shape), size)
    # torch counts the whole square of attention; the mask makes half of it unnecessary.
    assert flops["decoder"].forward + 2 * flops["attention"].forward == pytest.approx(
        language - 2 * tokens * router, rel=1e-3
    )
    assert flops["lm head"].forward == 2 * tokens * shape.vocabulary * shape.hidden
    vision = totals["Global"] - language - flops["lm head"].forward
    if backbone.model_type == "llava_onevision":  # projects before it pools; 3 % of the tower of the 7B model
        vision -= 2 * (PATCHES - 1) * visual * sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    assert flops["vision"].forward == pytest.approx(vision, rel=0.08)


def _flops_of_addmm(total: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


class TotalCounter(FlopCounterMode):
    """Counts without attribution to modules, which fails in torch for gradients that are computed in forward."""

    class NoModules(nullcontext[None]):
        parents = frozenset({"Global"})

    def __init__(self, **options: Any) -> None:
        super().__init__(custom_mapping={torch.ops.aten.addmm_: _flops_of_addmm}, **options)  # torch does not count it
        self.mod_tracker: Any = self.NoModules()


WAYS = ("forward", "backward", "recompute")


@pytest.mark.parametrize(("mode", "heads"), [("lora", "fp32"), ("full", "fp32"), ("lora", "bf16")])
def test_flops_of_a_training_step_are_those_that_torch_counts(config: Any, family: str, mode: str, heads: str) -> None:
    """Forward and backward, heads and geometric loss included, of a batch of the real loader."""
    recipe = config(
        family,
        mixed=True,
        train={"mode": mode, "batch_size": 2, "micro_batch_size": 2},
        heads={"compute": heads, "embeddings": heads},
        loss={"backend": "torch"},
        model={"attention": "eager"},
    )
    model = build_model(recipe, torch.device("cpu"))
    batch_flops = BatchFlops(recipe, model)  # the training loop's, for MFU
    setup, shape = batch_flops.setup, batch_flops.setup.shape
    stream = SampleStream(recipe.data)
    batch = next(iter(make_loader(recipe.data, stream, model.backbone, Share(0, 1, 2, 2), 1, pin_memory=False)))
    sizes = batch_flops.sizes(batch)
    assert sum(s.visual for s in sizes) == int((batch["input_ids"] == model.backbone.visual_token_id).sum())
    assert [s.frames for s in sizes] == [2, 3]
    assert sum(s.anchors > 0 for s in sizes) == sum(s.labelled > 0 for s in sizes) == 1
    assert sum(s.tracked for s in sizes) == len(batch["visual_positions"])
    assert sum(s.anchors for s in sizes) == len(batch["matches"].anchor.unique())
    with TotalCounter(display=False) as counter:
        model.train()(**batch)["loss"].backward()
    assert batch_flops(batch) == model_flops(setup, sizes)
    assert (setup.coordinates > 0) == (heads == "bf16")
    metrics = sum(work.flops for work in work_of_micro_batch(setup))
    masked = sum(flops_by_part(setup, size)["attention"].model for size in sizes)  # torch counts the whole square
    # LLaVA reads the last but one layer of its tower, a third of this one's: no gradient enters the last.
    unread = padded = 0.0
    patches = PATCHES * sum(s.visual for s in sizes)
    if shape.vision_gated:  # zeros up to a multiple of a tile's width
        zeros = -shape.vision_intermediate % MULTIPLE
        padded = 2 * patches * 3 * shape.vision_hidden * zeros * shape.vision_layers * (3 if mode == "full" else 1)
    if (family, mode) == ("llava_next_video", "full"):
        of_frame = PATCHES * shape.frame_tokens
        unread = 2 * patches * (2 * shape.vision_block_weights + 4 * of_frame * shape.vision_hidden)
    assert counter.get_total_flops() == pytest.approx(batch_flops(batch) + metrics + masked + padded - unread, rel=0.03)


def test_training_heads_alone_differentiates_heads_and_loss_only(config: Any, family: str) -> None:
    """Their gradients are computed in the forward pass, and those of their inputs are not needed."""
    counted, parts = {}, {}
    for mode in ("lora", "heads"):
        recipe = config(
            family,
            train={"mode": mode, "checkpointing": "full"},
            loss={"backend": "torch", "lm_weight": 0.0},
            model={"attention": "eager"},
        )
        model = build_model(recipe, torch.device("cpu"))
        loader = make_loader(recipe.data, SampleStream(recipe.data), model.backbone, Share(0, 1, 2, 2), 1, False)
        batch, flops = next(iter(loader)), BatchFlops(recipe, model)
        sizes = flops.sizes(batch)
        with TotalCounter(display=False) as counter:
            loss = model.train()(**batch)["loss"]
        with TotalCounter(display=False) as backward:
            loss.backward()
        counted[mode] = counter.get_total_flops()
        by_size = [flops_by_part(flops.setup, size) for size in sizes]
        parts[mode] = {name: [sum(getattr(one[name], way) for one in by_size) for way in WAYS] for name in by_size[0]}
    heads_backward = [parts[mode]["heads"][1] for mode in ("lora", "heads")]
    saved = parts["lora"]["adapters"][0] + heads_backward[0] - heads_backward[1]
    assert heads_backward[0] > heads_backward[1] and counted["lora"] - counted["heads"] == saved
    assert backward.get_total_flops() == 0
    through = ("decoder", "attention", "adapters", "vision", "lm head")
    assert all(parts["heads"][name][1:] == [0, 0] for name in through)  # neither backward nor recomputed


def test_recomputed_flops_are_those_that_torch_counts_on_top(config: Any, family: str) -> None:
    """Of the decoder alone, without its last product; the frozen vision tower is left alone."""
    counted, sizes = {}, []
    for checkpointing in ("off", "non_reentrant"):
        recipe = config(
            family, train={"checkpointing": checkpointing}, loss={"backend": "torch"}, model={"attention": "eager"}
        )
        model = build_model(recipe, torch.device("cpu"))
        loader = make_loader(recipe.data, SampleStream(recipe.data), model.backbone, Share(0, 1, 2, 2), 1, False)
        batch, flops = next(iter(loader)), BatchFlops(recipe, model)
        setup, sizes = flops.setup, flops.sizes(batch)
        with TotalCounter(display=False) as counter:
            model.train()(**batch)["loss"].backward()
        counted[checkpointing] = counter.get_total_flops()
    parts = [flops_by_part(setup, size) for size in sizes]
    # torch counts the whole square of attention; eager attention keeps its scores for backward.
    attention = sum(2 * part["attention"].forward for part in parts)
    again = attention + sum(part[name].recompute for part in parts for name in ("decoder", "adapters", "vision"))
    assert counted["non_reentrant"] - counted["off"] == pytest.approx(again, rel=1e-3)


def test_a_packed_row_counts_the_flops_of_its_sequences(config: Any, family: str) -> None:
    recipe = config(family, mixed=True, train={"batch_size": 4, "micro_batch_size": 4})
    model = build_model(recipe, torch.device("cpu"))
    flops, stream = BatchFlops(recipe, model), SampleStream(recipe.data)

    def batches(share: Share, packing: bool) -> list[dict[str, Any]]:
        return list(make_loader(recipe.data, stream, model.backbone, share, 1, pin_memory=False, packing=packing))

    (row,) = batches(Share(0, 1, 4, 4), True)
    alone = [flops.sizes(batch)[0] for batch in batches(Share(0, 1, 4, 1), False)]
    sizes = flops.sizes(row)
    assert len(row["input_ids"]) == 1 and len({size.tokens for size in alone}) > 1
    for name in ("frames", "tokens", "visual", "labelled"):
        assert [getattr(size, name) for size in sizes] == [getattr(size, name) for size in alone], name
    assert flops(row) == pytest.approx(sum(model_flops(flops.setup, [size]) for size in alone))


def test_flops_of_one_sequence_by_hand() -> None:
    size = SequenceSize(frames=2, tokens=1000, visual=900, tracked=900, anchors=100, labelled=10)
    flops = flops_by_part(setup_of("train.checkpointing=off"), size)
    layer = 3584 * (2 * 3584 + 2 * 512 + 3 * 18944)  # weights
    assert flops["decoder"].forward == 2 * 1000 * 28 * layer and flops["decoder"].backward == flops["decoder"].forward
    assert flops["attention"].forward == 2 * 1000**2 * 3584 * 28
    assert flops["heads"].total == 3 * 2 * 900 * 28 * (3584 * 1792)
    assert flops["geometric loss"].total == 6 * (100 * 900 * 1800 + 900 * 1800**2) * 28
    fp32 = flops_by_part(setup_of("heads.compute=fp32"), size)
    assert fp32["heads"].total == 3 * 2 * 900 * 28 * (3584 * 1792 * 2)
    assert fp32["geometric loss"].total == 6 * 100 * 900 * 3584 * 28
    assert flops["lm head"].forward == 2 * 10 * 3584 * 152064
    assert flops["vision"].backward == 0
    assert flops["attention"].model == 3 * flops["attention"].forward  # its backward recomputes on top
    assert {part for part, of in flops.items() if of.recompute} == {"attention"}


def test_a_frozen_tower_that_is_differentiated_costs_flops_that_mfu_does_not_count() -> None:
    size = SequenceSize(frames=2, tokens=1000, visual=900, tracked=900, anchors=100, labelled=10)
    today = setup_of("train.checkpointing=full")
    first = replace(today, design=FIRST_MEASURED)
    tower, before = (flops_by_part(setup, size)["vision"] for setup in (today, first))
    assert (before.model, before.total) == (tower.model, 3 * tower.forward) and tower.total == tower.forward


def test_mfu_does_not_count_recomputation() -> None:
    size = SequenceSize(frames=2, tokens=1000, visual=900, tracked=900, anchors=100, labelled=10)
    on, off = setup_of(), setup_of("train.checkpointing=off")
    assert model_flops(on, [size]) == model_flops(off, [size])
    assert flops_by_part(on, size)["decoder"].total > flops_by_part(off, size)["decoder"].total

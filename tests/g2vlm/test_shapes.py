"""Parameters and FLOPs of a model, counted."""

import torch
from support.tiny_g2vlm import Tail, drawn_images, tiny_g2vlm
from torch.utils.flop_counter import FlopCounterMode

from gasp_fast.g2vlm.attention import attended_pairs
from gasp_fast.g2vlm.shapes import Shapes
from gasp_fast.g2vlm.tokens import Arrangement


def test_parameters_of_each_part():
    model = tiny_g2vlm()
    counted = Shapes.of(model).parameters()
    experts = {kind: model.experts.of(kind) for kind in ("semantic", "geometric")}
    parts = {**experts, **{name: [getattr(model, name)] for name in counted if name not in experts}}
    assert counted == {
        name: sum(weight.numel() for part in modules for weight in part.parameters()) for name, modules in parts.items()
    }
    assert round(Shapes().parameters()["semantic"] / 1e9, 2) == 1.31  # of Qwen2-VL-2B, without embedding


def test_flops_of_a_forward_pass():
    """Torch counts no attention on a CPU; the pairs of ours are compared with masks in `test_attention.py`."""
    model, tail = tiny_g2vlm(), torch.zeros(1, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(drawn_images(batch=1), Tail(tail, tail))
    found = {part: sum(counts.values()) for part, counts in counter.get_flop_counts().items()}
    arrangement = Arrangement(frames=3, rows=2, columns=3, tail=16)
    flops = Shapes.of(model).forward_flops(arrangement)
    assert found["G2VLM.experts"] == flops["geometric"] + flops["semantic"]
    assert found["G2VLM.patch_map"] == flops["patch_map"]
    assert found["G2VLM.encoder"] == flops["encoder"] - 3 * 4 * 11**2 * 32  # 11 tokens in each of 3 frames
    assert flops["attention"] == 3 * 4 * 64 * attended_pairs(arrangement, "global")

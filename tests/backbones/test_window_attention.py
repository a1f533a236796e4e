"""Attention in all windows of a length at once gives what transformers computes window by window."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from gasp_fast.backbones import Conversation
from gasp_fast.backbones.base_model import use_checkpointing
from gasp_fast.backbones.window_attention import BatchedWindowAttention, PatchOrder, attend

SIZES = [(224, 224), (144, 240), (96, 80)]  # of frames: whole windows, and windows cut by one edge or both
GRIDS = {  # [(times, rows, columns)] in patches; a window has 8 x 8 patches
    "whole windows": [(1, 16, 24)] * 2,
    "cut at the lower edge": [(1, 20, 16)] * 3,
    "of several sizes": [(1, 28, 28), (1, 18, 30), (1, 4, 6), (1, 28, 28), (1, 12, 10)],
    "slices of a video": [(3, 12, 10), (1, 16, 16)],
}
CPU = torch.device("cpu")


@pytest.fixture(params=GRIDS)
def grid(request):
    return GRIDS[request.param]


def windows_of(runs):
    return [length for count, length in runs for _ in range(count)]


def test_windows_are_consecutive_rows_of_one_frame_and_one_part_of_it(grid):
    order = PatchOrder.of(grid, merge=2, window=4, device=CPU)
    areas = [rows * columns for times, rows, columns in grid for _ in range(times)]
    frame = torch.repeat_interleave(torch.arange(len(areas)), torch.tensor(areas))
    patch = (order.tokens[:, None] * 4 + torch.arange(4)).flatten()
    assert torch.equal(patch.sort().values, torch.arange(sum(areas)))
    places = torch.cat([frame[patch][:, None], order.positions[patch] // 8], dim=1)  # frame and part of each row
    parts = places.split(windows_of(order.windows))
    assert all((part == part[0]).all() for part in parts)
    assert len({tuple(part[0].tolist()) for part in parts}) == len(parts)


def test_rows_taken_frame_by_frame_are_whole_frames(grid):
    order = PatchOrder.of(grid, merge=2, window=4, device=CPU)
    areas = [rows * columns for times, rows, columns in grid for _ in range(times)]
    frame = torch.repeat_interleave(torch.arange(len(areas)), torch.tensor(areas))
    of_row = frame[(order.tokens[:, None] * 4 + torch.arange(4)).flatten()]
    if order.by_frame is not None:
        assert torch.equal(order.by_frame[order.from_frames], torch.arange(len(of_row)))
        of_row = of_row[order.by_frame]
    found = [part.unique() for part in of_row.split(windows_of(order.frames))]
    assert sorted(torch.cat(found).tolist()) == list(range(len(areas)))  # one frame each, and each frame once


def test_frames_of_whole_windows_stay_where_they_are():
    assert PatchOrder.of(GRIDS["whole windows"], merge=2, window=4, device=CPU).by_frame is None
    assert PatchOrder.of(GRIDS["of several sizes"], merge=2, window=4, device=CPU).by_frame is not None


def test_attention_stays_inside_its_window():
    query, key, value = torch.randn(3, 64, 2, 8, dtype=torch.float64).unbind()
    out = attend(query, key, value, [(3, 16), (2, 6), (1, 4)])
    for start, end in itertools.pairwise([0, 16, 32, 48, 54, 60, 64]):
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) / 8**0.5
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[start:end])
        torch.testing.assert_close(out[start:end], expected)


class HostReads(TorchFunctionMode):
    """Counts calls that make the host wait for a device, were the tensors on one."""

    NAMES = ("tolist", "item", "cpu", "numpy", "nonzero", "unique_consecutive", "__bool__", "__int__", "__float__")

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.NAMES or (name == "repeat_interleave" and torch.is_tensor(args[-1])):
            self.calls.append(name)
        return function(*args, **(kwargs or {}))


def test_the_tower_reads_the_sizes_of_the_frames_once_and_nothing_else(qwen):
    vision = copy.deepcopy(qwen.model).model.visual
    pixels = torch.randn(18 * 30 * 2, 3 * 2 * 8 * 8)
    grid = torch.tensor([[1, 18, 30], [1, 18, 30]])
    with torch.no_grad(), HostReads() as before:
        expected = vision(pixels, grid_thw=grid).pooler_output
    assert len(before.calls) > 3  # what is counted does occur
    model = copy.deepcopy(qwen.model)
    qwen.backbone.replace_slow_modules(model)
    with torch.no_grad(), HostReads() as reads:
        features = model.model.visual(pixels, grid_thw=grid).pooler_output
    assert reads.calls == ["tolist"]
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_whole_model_agrees_with_transformers(qwen, checkpointed):
    model = copy.deepcopy(qwen.model).train()
    fast = copy.deepcopy(model)
    qwen.backbone.replace_slow_modules(fast)
    if checkpointed:
        use_checkpointing(fast, "non_reentrant")
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    inputs = qwen.backbone.encode([Conversation(frames, [{"role": "user", "content": "What?"}])]).inputs
    inputs.pop("labels", None)
    results = []
    for variant in (model, fast):
        logits = variant(**inputs).logits
        logits.square().mean().backward()
        results.append((logits.detach(), [p.grad for p in variant.model.visual.parameters()]))
    (logits, gradients), (fast_logits, fast_gradients) = results
    torch.testing.assert_close(fast_logits, logits, rtol=1e-5, atol=1e-6)
    assert any(g is not None and g.abs().max() > 0 for g in gradients)
    for ours, theirs in zip(fast_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_replaced_modules_keep_the_models_parameters_under_their_names(qwen):
    fast = copy.deepcopy(qwen.model)
    parameters = dict(fast.named_parameters())
    qwen.backbone.replace_slow_modules(fast)
    assert [name for name, _ in fast.named_parameters()] == list(parameters)
    assert all(parameter is parameters[name] for name, parameter in fast.named_parameters())
    attentions = [block.attn for block in fast.model.visual.blocks]
    assert attentions and all(isinstance(attention, BatchedWindowAttention) for attention in attentions)


def test_eager_attention_is_not_replaced(qwen):
    model = qwen.backbone.load_model(dtype=torch.float32, attention="eager")
    before = [block.attn for block in model.model.visual.blocks]
    qwen.backbone.replace_slow_modules(model)
    assert all(block.attn is attention for block, attention in zip(model.model.visual.blocks, before, strict=True))


def test_flash_attention_is_replaced_in_the_tower(qwen):
    model = copy.deepcopy(qwen.model)
    pixels, grid = torch.randn(18 * 30, 3 * 2 * 8 * 8), torch.tensor([[1, 18, 30]])
    with torch.no_grad():
        expected = model.model.visual(pixels, grid_thw=grid).pooler_output
    model.model.visual.config._attn_implementation = "flash_attention_2"
    qwen.backbone.replace_slow_modules(model)
    with torch.no_grad(), HostReads() as reads:
        features = model.model.visual(pixels, grid_thw=grid).pooler_output
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    assert reads.calls == ["tolist"]

"""Attention in all windows of a length at once gives what transformers computes window by window."""

import copy
import itertools

import numpy as np
import pytest
import torch

from gasp_fast.backbones import Conversation
from gasp_fast.backbones.base_model import use_checkpointing
from gasp_fast.backbones.window_attention import BatchedWindowAttention, WindowRows, attend, group_by_length

SIZES = [(224, 224), (144, 240), (96, 80)]  # of frames: whole windows, and windows cut by one edge or both
BOUNDARIES = torch.tensor([0, 16, 32, 40, 40, 56, 60, 64])  # three lengths, an empty window


def test_every_row_is_in_exactly_one_window_of_its_length():
    groups = group_by_length(BOUNDARIES)
    assert sorted(torch.cat([rows.flatten() for rows in groups]).tolist()) == list(range(64))
    assert sorted(rows.shape[1] for rows in groups) == [4, 8, 16]


def test_attention_stays_inside_its_window():
    query, key, value = torch.randn(3, 64, 2, 8, dtype=torch.float64).unbind()
    out = attend(query, key, value, group_by_length(BOUNDARIES))
    for start, end in itertools.pairwise(BOUNDARIES.tolist()):
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) / 8**0.5
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[start:end])
        torch.testing.assert_close(out[start:end], expected)


def test_boundaries_are_read_once_a_batch():
    window_rows, frames = WindowRows(), torch.tensor([0, 64])
    first = window_rows(BOUNDARIES), window_rows(frames)
    for _ in range(3):
        assert window_rows(BOUNDARIES) is first[0]
        assert window_rows(frames) is first[1]
    assert window_rows(BOUNDARIES.clone()) is not first[0]


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


def test_only_sdpa_is_replaced(qwen):
    model = qwen.backbone.load_model(dtype=torch.float32, attention="eager")
    before = [block.attn for block in model.model.visual.blocks]
    qwen.backbone.replace_slow_modules(model)
    assert all(block.attn is attention for block, attention in zip(model.model.visual.blocks, before, strict=True))

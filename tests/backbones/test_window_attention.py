"""Windows attended to at once give what transformers gives window by window."""

import copy
import itertools

import numpy as np
import pytest
import torch

from gasp_fast.backbones import Conversation
from gasp_fast.backbones.window_attention import Windows, attend, group_by_length

SIZES = [(224, 224), (144, 240), (96, 80)]  # of frames: windows whole, and cut by either edge or both
LIMITS = torch.tensor([0, 16, 32, 40, 40, 56, 60, 64])  # three lengths, an empty window


def test_every_row_is_in_exactly_one_window_of_its_length():
    groups = group_by_length(LIMITS)
    assert sorted(torch.cat([rows.flatten() for rows in groups]).tolist()) == list(range(64))
    assert sorted(rows.shape[1] for rows in groups) == [4, 8, 16]


def test_attention_stays_inside_its_window():
    query, key, value = torch.randn(3, 64, 2, 8, dtype=torch.float64).unbind()
    out = attend(query, key, value, group_by_length(LIMITS))
    for start, end in itertools.pairwise(LIMITS.tolist()):
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) / 8**0.5
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[start:end])
        torch.testing.assert_close(out[start:end], expected)


def test_limits_are_asked_for_once_a_batch(monkeypatch):
    asked = []
    monkeypatch.setattr("gasp_fast.backbones.window_attention.group_by_length", lambda limits: asked.append(1) or [])
    windows, other = Windows(), torch.tensor([0, 64])
    for _ in range(3):
        windows.rows(LIMITS)
        windows.rows(other)
    assert len(asked) == 2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_whole_model_agrees_with_transformers(qwen, checkpointed):
    model = copy.deepcopy(qwen.model).train()
    quick = copy.deepcopy(model)
    qwen.backbone.quicken(quick)
    if checkpointed:
        quick.gradient_checkpointing_enable({"use_reentrant": False})
    draw = np.random.default_rng(0)
    frames = [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    inputs = qwen.backbone.encode([Conversation(frames, [{"role": "user", "content": "What?"}])]).inputs
    inputs.pop("labels", None)
    results = []
    for one in (model, quick):
        logits = one(**inputs).logits
        logits.square().mean().backward()
        results.append((logits.detach(), [p.grad for p in one.model.visual.parameters()]))
    (logits, gradients), (quick_logits, quick_gradients) = results
    torch.testing.assert_close(quick_logits, logits, rtol=1e-5, atol=1e-6)
    assert any(g is not None and g.abs().max() > 0 for g in gradients)
    for ours, theirs in zip(quick_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)

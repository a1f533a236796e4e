"""What is tapped is what the model computes, and nothing stays behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from gasp_fast.collator import Collator, CollatorConfig
from gasp_fast.evaluation.evaluate import run_features
from gasp_fast.evaluation.features import KINDS, FeatureTap
from gasp_fast.evaluation.sampling import Questions
from gasp_fast.evaluation.subject import Subject


@pytest.fixture
def batch(subject: Subject, questions: Questions) -> dict[str, Any]:
    return Collator(subject.backbone, CollatorConfig(anchors="first"))([questions.sample(0), questions.sample(1)])


def tapped(
    subject: Subject, batch: dict[str, Any], rope: str = "before"
) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    found: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    run_features(subject, batch, lambda kind, layer, q, k: found.update({(kind, layer): (q, k)}), KINDS, rope)
    return found


def by_hand(subject: Subject, batch: dict[str, Any], rope: str) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """From transformers' own hidden states, layer weights and rotary tables, in the formulas of the paper."""
    inputs = {k: v for k, v in batch.items() if k not in ("matches", "visual_positions", "labels")}
    language, positions = subject.backbone.language_model(subject.model), batch["visual_positions"]
    tables: list[tuple[Tensor, Tensor]] = []
    hook = language.rotary_emb.register_forward_hook(lambda module, args, output: tables.append(output))
    before_norm: list[Tensor] = []
    last = language.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    with torch.inference_mode():
        states = subject.model(**inputs, output_hidden_states=True).hidden_states
    hook.remove()
    last.remove()
    after_layer = [*states[1:-1], before_norm[0]]
    shape = subject.backbone.attention_shape
    cos, sin = tables[0]
    found: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    for layer, (entering, leaving) in enumerate(zip(states[:-1], after_layer, strict=True)):
        hidden = leaving.reshape(-1, leaving.shape[-1])[positions]
        found["hidden", layer] = (hidden, hidden)
        embeddings = subject.heads.by_layer[str(layer)](hidden)
        found["head", layer] = (embeddings, embeddings)
        block = language.layers[layer]
        x = block.input_layernorm(entering)
        pair = []
        for projection, heads in (
            (block.self_attn.q_proj, shape.query_heads),
            (block.self_attn.k_proj, shape.key_heads),
        ):
            state = projection(x).reshape(*x.shape[:2], heads, shape.head_dim)
            if rope == "after":
                half = shape.head_dim // 2
                turned = torch.cat([-state[..., half:], state[..., :half]], -1)
                state = state * cos[:, :, None] + turned * sin[:, :, None]
            state = state.reshape(-1, heads, shape.head_dim)[positions]
            grouped = shape.query_heads != shape.key_heads
            pair.append(state.mean(1) if grouped else state.reshape(len(positions), -1))
        found["qk", layer] = (pair[0], pair[1])
    return found


@pytest.mark.parametrize("rope", ["before", "after"])
def test_features_are_what_the_model_computes(subject, batch, rope):
    found, expected = tapped(subject, batch, rope), by_hand(subject, batch, rope)
    assert found.keys() == expected.keys()
    assert len(found) == 3 * subject.backbone.layer_count
    for key in expected:
        for got, wanted in zip(found[key], expected[key], strict=True):
            assert got.shape == wanted.shape
            assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5), key


def test_grouped_queries_are_averaged_and_full_ones_are_whole(subjects, questions):
    width = {}
    for name, subject in subjects.items():
        batch = Collator(subject.backbone, CollatorConfig(anchors="first"))([questions.sample(0)])
        width[name] = tapped(subject, batch)["qk", 0][0].shape[1]
    assert width == {"qwen-gqa": 32, "qwen-mha": 128, "llava": 128}


def test_rotation_changes_queries_and_keys(subjects, questions):
    subject = subjects["qwen-gqa"]
    batch = Collator(subject.backbone, CollatorConfig(anchors="first"))([questions.sample(0)])
    before, after = tapped(subject, batch, "before"), tapped(subject, batch, "after")
    assert not torch.allclose(before["qk", 1][0], after["qk", 1][0])
    assert torch.equal(before["hidden", 1][0], after["hidden", 1][0])


def test_features_of_a_layer_are_gone_when_the_next_one_speaks(subjects, questions):
    subject = subjects["qwen-gqa"]
    batch = Collator(subject.backbone, CollatorConfig(anchors="first"))([questions.sample(0)])
    seen: list[tuple[int, weakref.ref[Tensor]]] = []

    def watch(kind: str, layer: int, queries: Tensor, keys: Tensor) -> None:
        gc.collect()
        assert all(reference() is None for at, reference in seen if at < layer)
        seen.append((layer, weakref.ref(keys)))

    run_features(subject, batch, watch, KINDS, "before")
    assert len(seen) == 3 * subject.backbone.layer_count


def hooks(subject: Subject) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in subject.model.modules())


@pytest.mark.parametrize("rope", ["before", "after"])
def test_nothing_stays_behind_even_after_an_error(subjects, questions, rope):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    subject = subjects["llava"]
    batch = Collator(subject.backbone, CollatorConfig(anchors="first"))([questions.sample(0)])
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with torch.inference_mode():  # transformers hangs hooks of its own on a model when it first runs
        run_features(subject, batch, lambda *_: None, (), "before")
    before = hooks(subject)

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run_features(subject, batch, fail, KINDS, rope)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original
    assert hooks(subject) == before


def test_an_attention_that_cannot_be_watched_is_refused(subjects):
    subject = subjects["qwen-gqa"]
    model = subject.backbone.load_model(dtype=torch.float32, attention="eager")
    with (
        pytest.raises(ValueError, match=r'load the model with attention="sdpa"'),
        FeatureTap(subject.backbone, model, torch.zeros(1).long(), print, ["qk"], None, "after"),
    ):
        pass
    with pytest.raises(ValueError, match="there are no heads"):
        FeatureTap(subject.backbone, model, torch.zeros(1).long(), print, ["head"])

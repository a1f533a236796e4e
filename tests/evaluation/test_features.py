"""Captured features are what the model computes; no hook and no memory remain."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gasp_fast.collator import Collator, CollatorConfig
from gasp_fast.evaluation.dataset import EvaluationSet
from gasp_fast.evaluation.evaluated_model import EvaluatedModel
from gasp_fast.evaluation.features import KINDS, run_with_features
from gasp_fast.supervision.heads import CorrespondenceHeads


@pytest.fixture
def batch(model: EvaluatedModel, dataset: EvaluationSet) -> dict[str, Any]:
    return collated(model, dataset, 0, 1)


def collated(model: EvaluatedModel, dataset: EvaluationSet, *indices: int) -> dict[str, Any]:
    return Collator(model.backbone, CollatorConfig(anchors="first"))([dataset.sample(index) for index in indices])


def features_of(
    model: EvaluatedModel, batch: dict[str, Any], rope: str = "before"
) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    features: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    run_with_features(model, batch, lambda kind, layer, q, k: features.update({(kind, layer): (q, k)}), KINDS, rope)
    return features


def by_hand(model: EvaluatedModel, batch: dict[str, Any], rope: str) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """Features from what enters each layer, layer weights and rotary tables, by the formulas of the paper."""
    inputs = {k: v for k, v in batch.items() if k not in ("matches", "visual_positions", "labels")}
    language, positions = model.backbone.language_model(model.model), batch["visual_positions"]
    tables: list[tuple[Tensor, Tensor]] = []
    hook = language.rotary_emb.register_forward_hook(lambda module, args, output: tables.append(output))
    states: list[Tensor] = []
    entered = [module.register_forward_pre_hook(lambda _, args: states.append(args[0])) for module in language.layers]
    entered.append(language.norm.register_forward_pre_hook(lambda _, args: states.append(args[0])))
    with torch.inference_mode():
        model.model(**inputs)
    for handle in (hook, *entered):
        handle.remove()
    shape = model.backbone.attention_shape
    cos, sin = tables[0]
    features: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    for layer, (entering, leaving) in enumerate(pairwise(states)):
        hidden = leaving.reshape(-1, leaving.shape[-1])[positions]
        features["hidden", layer] = (hidden, hidden)
        block = language.layers[layer]
        x = block.input_layernorm(entering)
        following = language.layers[layer + 1].input_layernorm if layer + 1 < len(language.layers) else language.norm
        of_head = {"output": leaving, "output_normed": following(leaving), "layer_input_normed": x}[model.heads.reads]
        embeddings = model.heads.by_layer[str(layer)](of_head.reshape(-1, leaving.shape[-1])[positions])
        features["head", layer] = (embeddings, embeddings)
        pair = []
        for name, heads in (("q", shape.query_heads), ("k", shape.key_heads)):
            state = getattr(block.self_attn, f"{name}_proj")(x).reshape(*x.shape[:2], heads, shape.head_dim)
            if hasattr(block.self_attn, f"{name}_norm"):
                scale = state.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
                state = state * scale * getattr(block.self_attn, f"{name}_norm").weight
            if rope == "after":
                half = shape.head_dim // 2
                turned = torch.cat([-state[..., half:], state[..., :half]], -1)
                state = state * cos[:, :, None] + turned * sin[:, :, None]
            state = state.reshape(-1, heads, shape.head_dim)[positions]
            grouped = shape.query_heads != shape.key_heads
            pair.append(state.mean(1) if grouped else state.reshape(len(positions), -1))
        features["qk", layer] = (pair[0], pair[1])
    return features


@pytest.mark.parametrize("rope", ["before", "after"])
@pytest.mark.parametrize("model", ["qwen-gqa", "qwen-mha", "llava", "qwen3"], indirect=True)
def test_features_are_what_the_model_computes(model, batch, rope):
    features, expected = features_of(model, batch, rope), by_hand(model, batch, rope)
    assert features.keys() == expected.keys()
    assert len(features) == 3 * model.backbone.layer_count
    for key in expected:
        for got, wanted in zip(features[key], expected[key], strict=True):
            assert got.shape == wanted.shape
            assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("reads", ["output_normed", "layer_input_normed"])
def test_heads_are_given_what_they_were_trained_to_read(model, batch, reads):
    heads: Any = model.heads
    layers = {int(name): head for name, head in heads.by_layer.items() if name != "1"}
    given = replace(model, heads=CorrespondenceHeads(layers, reads))
    whole = replace(model, heads=CorrespondenceHeads({int(name): head for name, head in heads.by_layer.items()}, reads))
    features, expected = features_of(given, batch), by_hand(whole, batch, "before")
    assert {layer for kind, layer in features if kind == "head"} == layers.keys()
    for key, (got, _) in features.items():
        assert torch.allclose(got, expected[key][0], rtol=1e-4, atol=1e-5), key
    assert not torch.allclose(features["head", 0][0], features_of(model, batch)["head", 0][0], atol=1e-3)


def test_grouped_queries_are_averaged_and_full_ones_are_whole(models, dataset):
    width = {}
    for name, model in models.items():
        batch = collated(model, dataset, 0)
        width[name] = features_of(model, batch)["qk", 0][0].shape[1]
    assert width == {"qwen-gqa": 32, "qwen-mha": 128, "llava": 128, "qwen3": 48}


def test_rotation_changes_queries_and_keys(models, dataset):
    model = models["qwen-gqa"]
    batch = collated(model, dataset, 0)
    before, after = features_of(model, batch, "before"), features_of(model, batch, "after")
    assert not torch.allclose(before["qk", 1][0], after["qk", 1][0])
    assert torch.equal(before["hidden", 1][0], after["hidden", 1][0])


def test_features_of_a_layer_are_freed_before_those_of_the_next(models, dataset):
    model = models["qwen-gqa"]
    batch = collated(model, dataset, 0)
    seen: list[tuple[int, weakref.ref[Tensor]]] = []

    def watch(kind: str, layer: int, queries: Tensor, keys: Tensor) -> None:
        gc.collect()
        assert all(reference() is None for at, reference in seen if at < layer)
        seen.append((layer, weakref.ref(keys)))

    run_with_features(model, batch, watch, KINDS, "before")
    assert len(seen) == 3 * model.backbone.layer_count


def hooks(model: EvaluatedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.model.modules())


@pytest.mark.parametrize("rope", ["before", "after"])
def test_no_hook_remains_even_after_an_error(models, dataset, rope):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = models["llava"]
    batch = collated(model, dataset, 0)
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with torch.inference_mode():  # transformers registers hooks of its own when a model first runs
        run_with_features(model, batch, lambda *_: None, (), "before")
    before = hooks(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run_with_features(model, batch, fail, KINDS, rope)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original
    assert hooks(model) == before


def test_attention_outside_transformers_table_is_refused(models, dataset):
    model = models["qwen-gqa"]
    batch = collated(model, dataset, 0)
    eager = replace(model, model=model.backbone.load_model(dtype=torch.float32, attention="eager"))
    with pytest.raises(ValueError, match=r'load the model with attention="sdpa"'):
        run_with_features(eager, batch, print, ["qk"], "after")


def test_head_features_of_a_model_without_heads_are_refused(models, dataset):
    model = models["qwen-gqa"]
    with pytest.raises(ValueError, match="there are no heads"):
        run_with_features(replace(model, heads=None), collated(model, dataset, 0), print, ["head"], "before")

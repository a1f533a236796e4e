"""Predictions of every layer for a batch of sequences, from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gasp_fast.collator import Collator, CollatorConfig, Sample
from gasp_fast.loss.function import PCK_RADIUS

from .evaluated_model import EvaluatedModel
from .features import Kind, Rope, layers_with, run_with_features
from .matching import Matcher, similarities
from .metrics import within
from .predictions import Predictions


class Predictor:
    """Predicts where query points are in later frames, with each layer's features."""

    def __init__(self, evaluated: EvaluatedModel, kinds: Sequence[Kind], rope: Rope, temperature: float) -> None:
        self.layers = {kind: layers_with(kind, evaluated.backbone, evaluated.heads) for kind in kinds}  # from 0
        self._evaluated, self._rope, self._temperature = evaluated, rope, temperature
        self._collator = Collator(evaluated.backbone, CollatorConfig(anchors="first"))

    def __call__(self, frames: Sequence[tuple[int, ...]], samples: Sequence[Sample]) -> list[Predictions]:
        """Predictions for each sequence; `frames` are its frame numbers in the scene."""
        empty = Predictions.empty({kind: len(layers) for kind, layers in self.layers.items()})
        predictions = [empty] * len(samples)
        tracked = [index for index, sample in enumerate(samples) if sample.tracks]
        if not tracked:
            return predictions
        batch = self._collator([samples[index] for index in tracked])
        if not len(batch["matches"]):
            return predictions
        best_tokens = self.best_tokens(batch)
        for sequence, index in enumerate(tracked):
            predictions[index] = self._sequence_predictions(batch, best_tokens, sequence, frames[index])
        return predictions

    def best_tokens(self, batch: dict[str, Any]) -> dict[Kind, tuple[Tensor, Tensor]]:
        """Predicted token of the batch and its probability, both `[L, M]` on the CPU, for each kind of features."""
        matcher = Matcher(batch["matches"], self._temperature, self._evaluated.device)
        by_layer: dict[Kind, dict[int, tuple[Tensor, Tensor]]] = {kind: {} for kind in self.layers}

        def match(kind: Kind, layer: int, queries: Tensor, keys: Tensor) -> None:
            by_layer[kind][layer] = matcher(queries, keys)

        run_with_features(self._evaluated, batch, match, list(self.layers), self._rope)
        return {
            kind: (
                torch.stack([by_layer[kind][layer][0] for layer in layers]).cpu(),
                torch.stack([by_layer[kind][layer][1].float() for layer in layers]).cpu(),
            )
            for kind, layers in self.layers.items()
        }

    def _sequence_predictions(
        self,
        batch: dict[str, Any],
        best_tokens: dict[Kind, tuple[Tensor, Tensor]],
        sequence: int,  # its index in the batch
        frames: tuple[int, ...],
    ) -> Predictions:
        matches = batch["matches"]
        first_frame = int(matches.sequence_offsets[sequence])
        first, end = matches.frame_offsets[matches.sequence_offsets[sequence : sequence + 2]].tolist()  # tokens
        chosen = ((matches.anchor >= first) & (matches.anchor < end)).nonzero()[:, 0]  # [m], matches of the sequence
        xy = matches.token_xy.numpy()  # [N, 2]
        anchor, target = matches.anchor[chosen].numpy(), matches.target[chosen].numpy()  # [m]
        frame = torch.searchsorted(matches.frame_offsets[1:].contiguous(), matches.target[chosen], right=True)  # [m]
        gap = np.asarray(frames)[frame.numpy() - first_frame] - frames[0]
        best = {kind: tokens[:, chosen].numpy() for kind, (tokens, _) in best_tokens.items()}  # [L, m]
        return Predictions(
            anchor=anchor - first,
            target=target - first,
            gap=gap,
            moved=~within(xy[anchor], xy[target], PCK_RADIUS),
            best={kind: np.where(tokens < 0, -1, tokens - first).astype(np.int32) for kind, tokens in best.items()},
            correct={kind: within(xy[tokens], xy[target], PCK_RADIUS) & (tokens >= 0) for kind, tokens in best.items()},
            confidence={kind: confidence[:, chosen].numpy() for kind, (_, confidence) in best_tokens.items()},
        )


def heat_maps(
    evaluated: EvaluatedModel, sample: Sample, kind: Kind, layer: int, token: int, rope: Rope, temperature: float
) -> list[NDArray[np.float32]]:
    """Matching probabilities of one query token over every frame of a sample: `[rows, columns]` each."""
    batch = Collator(evaluated.backbone, CollatorConfig(anchors="first"))([sample])
    rows: list[Tensor] = []

    def consumer(this_kind: Kind, this_layer: int, queries: Tensor, keys: Tensor) -> None:
        if this_layer == layer:
            rows.append(similarities(queries, keys, token, temperature))  # [N]

    run_with_features(evaluated, batch, consumer, [kind], rope)
    offsets = batch["matches"].frame_offsets.tolist()
    maps = []
    for frame, start, end in zip(sample.frames, offsets[:-1], offsets[1:], strict=True):
        grid = evaluated.backbone.frame_grid(frame.shape[1], frame.shape[0])
        maps.append(rows[0][start:end].float().softmax(0).reshape(grid.rows, grid.columns).cpu().numpy())
    return maps

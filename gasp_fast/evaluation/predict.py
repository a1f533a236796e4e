"""Predictions of every layer for a batch of sequences, from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gasp_fast.backbones import TokenGrid
from gasp_fast.collator import Collator, CollatorConfig, Sample, track_tokens

from .evaluated_model import EvaluatedModel
from .features import Captured, Kind, Rope, layers_with, run_with_features
from .matching import Directions, Matcher, measured_names
from .predictions import Predictions

Confidence = Literal["cosine", "attention"]
Predicted = dict[str, tuple[Tensor, Tensor]]  # measured name -> tokens and probabilities


class Predictor:
    """Predicts where query points are in other frames, with each layer's features."""

    def __init__(
        self,
        evaluated: EvaluatedModel,
        kinds: Sequence[Kind],
        rope: Rope,
        temperature: float,
        *,
        direction: Directions = "forward",
        confidence: Confidence = "cosine",
        groups: bool = False,  # also of each head group of `qk`
    ) -> None:
        self.measured = measured_names(kinds, direction)
        of_kind = {kind: layers_with(kind, evaluated.backbone, evaluated.heads) for kind in kinds}
        self.layers = {name: of_kind[kind] for name, (kind, _) in self.measured.items()}  # from 0
        self._evaluated, self._rope, self._temperature, self._confidence = evaluated, rope, temperature, confidence
        self._captured: list[Captured] = [*kinds, *(("groups",) if groups and "qk" in kinds else ())]
        self._collator = Collator(evaluated.backbone, CollatorConfig(anchors="first"))

    def __call__(self, frames: Sequence[tuple[int, ...]], samples: Sequence[Sample]) -> list[Predictions]:
        """Predictions for each sequence; `frames` are its frame numbers in the scene."""
        empty = Predictions.empty({name: len(layers) for name, layers in self.layers.items()})
        predictions = [empty] * len(samples)
        tracked = [index for index, sample in enumerate(samples) if sample.tracks]
        if not tracked:
            return predictions
        batch = self._collator([samples[index] for index in tracked])
        if not len(batch["matches"]):
            return predictions
        best, groups = self.best_tokens(batch)
        for sequence, index in enumerate(tracked):
            predictions[index] = self._sequence_predictions(
                batch, best, groups, sequence, frames[index], samples[index]
            )
        return predictions

    def best_tokens(self, batch: dict[str, Any]) -> tuple[Predicted, dict[str, Tensor]]:
        """For each measured name: predicted token of the batch and its probability, both `[L, M]`, on the CPU.

        And for `qk`, the predicted token of each head group, `[L, G, M]`.
        """
        device, shape = self._evaluated.device, self._evaluated.backbone.attention_shape
        matchers = {
            direction: Matcher(batch["matches"], self._temperature, device, direction)
            for direction in {direction for _, direction in self.measured.values()}
        }
        by_layer: dict[str, dict[int, tuple[Tensor, Tensor]]] = {name: {} for name in self.measured}
        by_group: dict[str, dict[int, Tensor]] = {name: {} for name in self.measured}

        def match(kind: Captured, layer: int, queries: Tensor, keys: Tensor) -> None:
            for name, (measured, direction) in self.measured.items():
                matcher = matchers[direction]
                if kind == measured:
                    best, confidence = matcher(queries, keys)
                    if kind == "qk" and self._confidence == "attention":
                        confidence = matcher.attention(queries, keys, best, shape.head_dim)
                    by_layer[name][layer] = best, confidence.float()
                elif kind == "groups" and measured == "qk":
                    by_group[name][layer] = matcher(queries, keys)[0]

        run_with_features(self._evaluated, batch, match, self._captured, self._rope)
        best = {
            name: (
                torch.stack([by_layer[name][layer][0] for layer in layers]).cpu(),
                torch.stack([by_layer[name][layer][1] for layer in layers]).cpu(),
            )
            for name, layers in self.layers.items()
        }
        groups = {
            name: torch.stack([of_layer[layer] for layer in self.layers[name]]).cpu()
            for name, of_layer in by_group.items()
            if of_layer
        }
        return best, groups

    def _sequence_predictions(
        self,
        batch: dict[str, Any],
        best: Predicted,
        groups: dict[str, Tensor],
        sequence: int,  # its index in the batch
        frames: tuple[int, ...],
        sample: Sample,
    ) -> Predictions:
        matches = batch["matches"]
        first_frame = int(matches.sequence_offsets[sequence])
        first, end = matches.frame_offsets[matches.sequence_offsets[sequence : sequence + 2]].tolist()  # tokens
        chosen = ((matches.anchor >= first) & (matches.anchor < end)).nonzero()[:, 0]  # [m], matches of the sequence
        frame = torch.searchsorted(matches.frame_offsets[1:].contiguous(), matches.target[chosen], right=True)  # [m]
        anchor_at, target_at, grids = self._positions(sample)

        def in_sequence(tokens: Tensor) -> NDArray[np.int32]:
            of_sequence = tokens[..., chosen].numpy()
            return np.where(of_sequence < 0, -1, of_sequence - first).astype(np.int32)

        return Predictions(
            anchor=matches.anchor[chosen].numpy() - first,
            target=matches.target[chosen].numpy() - first,
            gap=np.asarray(frames)[frame.numpy() - first_frame] - frames[0],
            anchor_at=anchor_at,
            target_at=target_at,
            grids=grids,
            best={name: in_sequence(tokens) for name, (tokens, _) in best.items()},
            confidence={name: confidence[:, chosen].numpy() for name, (_, confidence) in best.items()},
            groups={name: in_sequence(tokens) for name, tokens in groups.items()},
        )

    def _positions(self, sample: Sample) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
        """`anchor_at`, `target_at` and `grids` of a sequence's predictions, in the collator's order of matches."""
        sizes = np.array([frame.shape[1::-1] for frame in sample.frames])  # [F, 2], width and height
        grids = [self._evaluated.backbone.frame_grid(*size) for size in sizes.tolist()]
        (tracks,) = sample.tracks
        starts = np.cumsum([0, *(grid.tokens for grid in grids[:-1])])  # [F]
        seen = track_tokens(tracks, grids, starts) >= 0  # [T, F]
        track, later = np.nonzero(seen[:, :1] & seen[:, 1:])  # [M], [M]
        at = (tracks.uv / sizes).astype(np.float32)  # [T, F, 2]
        rows = [_in_shares(grid, *size) for grid, size in zip(grids, sizes.tolist(), strict=True)]
        return at[track, 0], at[track, later + 1], np.array(rows)


def _in_shares(grid: TokenGrid, width: int, height: int) -> tuple[float, ...]:
    """Columns, rows, left, top, right, bottom; the rectangle in shares of the frame's width and height."""
    return (
        grid.columns, grid.rows, grid.left / width, grid.top / height, grid.right / width, grid.bottom / height,
    )  # fmt: skip

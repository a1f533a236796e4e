"""Data of the part of a page in which a reader points at a token of a first frame: where does each layer look for it?

`pointing.json` in a report's folder has it for a few sequences: small frames, the true tokens, and for each kind of
features and each layer the predicted tokens and what the page needs to draw their matching probabilities.

The probabilities in a frame are a softmax of the similarities of one query with the frame's keys, so a number added to
all of them changes nothing. Of each query and frame the mean is subtracted; what remains, `S` `[T, K]` (queries of the
first frame, keys of the later ones), is approximated by a product of 8-bit factors of few components: the leading
singular vectors of `S`, then those of the error that their rounding leaves. The predicted tokens are exact. At the
points of the evaluation they are those that the report counts.

The sequences depend on the data alone, so reports of several models have the same ones: from little motion to much, of
different scenes where possible. Queries are of the first frame; the causal direction is not in the page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from gasp_fast.backbones import TokenGrid
from gasp_fast.backbones.base import RGBImage
from gasp_fast.collator import Collator, CollatorConfig, Sample, track_tokens
from gasp_fast.data.tracks.build import build_tracks

from .dataset import EvaluationSet
from .evaluate import Evaluation, EvaluationConfig
from .evaluated_model import EvaluatedModel
from .features import Captured, run_with_features
from .matching import is_causal
from .predictions import Predictions

VERSION = 1
LATER = 4  # later frames of a sequence
COMPONENTS = (32, 16, 8)  # of a layer; as many as leave room for
ENOUGH = 8  # layers
LARGEST = 1_600_000  # bytes of all factors and predicted tokens of a model; two models make a page of 5 MB
SIDE = 400  # pixels of a frame's longer side
NOWHERE = 0xFFFF  # in place of a token


@dataclass(frozen=True)
class Plan:
    """What of the features is stored, so that it fits into `LARGEST`."""

    layers: dict[str, list[int]]  # of each kind of features, from 0
    components: int


@dataclass(frozen=True)
class ShownFrames:
    """The frames of a sequence that are shown, and their tokens in the sequence."""

    places: NDArray[np.integer]  # in the sequence; the first is 0
    starts: NDArray[np.integer]  # first token of each
    grids: list[TokenGrid]  # rectangles in shares of the frame's size


def pointing_data(
    evaluated: EvaluatedModel, dataset: EvaluationSet, config: EvaluationConfig, evaluation: Evaluation, count: int
) -> dict[str, Any] | None:
    """The content of `pointing.json` for `count` sequences, from one forward pass each.

    None if there is nothing to show: no sequences, no forward direction, or frames of too many tokens.
    """
    layers = {name: numbers for name, numbers in evaluation.layers.items() if not is_causal(name)}
    if not layers or not count:
        return None
    chosen = representative_sequences(dataset, evaluation.predictions, count)
    shown = {index: shown_frames(evaluation.predictions[index]) for index in chosen}
    plan = storage_plan(list(shown.values()), layers)
    if plan is None:
        return None
    collator = Collator(evaluated.backbone, CollatorConfig(anchors="first"))
    sequences = []
    for index in chosen:
        sample, predictions = dataset.sample(index), evaluation.predictions[index]
        truth = _truth(evaluated, dataset, index, sample, predictions, shown[index])
        features = _Features(shown[index], plan)
        kinds = cast(list[Captured], list(plan.layers))
        run_with_features(evaluated, collator([sample]), features, kinds, config.rope)
        for (name, layer), one in features.found.items():
            row = evaluation.layers[name].index(layer)
            one.best[truth.anchor, truth.frame] = predictions.best[name][row][truth.match] - truth.start
        sequences.append(_as_json(dataset, index, sample, shown[index], truth, features))
    return {"version": VERSION, "temperature": config.temperature, "sequences": sequences}


def representative_sequences(dataset: EvaluationSet, predictions: Sequence[Predictions], count: int) -> list[int]:
    """Indices of sequences at even ranks of motion, among those with at least the median number of correspondences."""
    motion = {
        index: float(np.linalg.norm(one.target_at - one.anchor_at, axis=1).mean())
        for index, one in enumerate(predictions)
        if len(one)
    }
    median = np.median([len(predictions[index]) for index in motion])
    candidates = [index for index in motion if len(predictions[index]) >= median]
    ranked = sorted(candidates, key=lambda index: (motion[index], index))
    chosen: list[int] = []
    for rank in (int((k + 0.5) / count * len(ranked)) for k in range(count)):
        # The nearest rank from a scene that is not chosen yet; if there is none, the nearest that is not chosen.
        nearest = sorted((i for i in ranked if i not in chosen), key=lambda i: abs(ranked.index(i) - rank))
        scenes = {dataset.scene_entry(i).name for i in chosen}
        other_scenes = [i for i in nearest if dataset.scene_entry(i).name not in scenes]
        chosen += (other_scenes or nearest)[:1]
    return chosen


def shown_frames(predictions: Predictions) -> ShownFrames:
    """The first frame and at most `LATER` later ones, evenly spread."""
    grids = predictions.token_grids()
    starts = np.cumsum([0, *(grid.tokens for grid in grids)])
    later = len(grids) - 1
    places = np.concatenate([[0], np.linspace(1, later, min(LATER, later)).round().astype(int)])
    return ShownFrames(places, starts[places], [grids[place] for place in places])


def storage_plan(
    sequences: Sequence[ShownFrames], layers: Mapping[str, Sequence[int]], largest: int = LARGEST
) -> Plan | None:
    """The layers that fit, evenly spread if they are not all, and their components; None if not one layer fits."""
    tokens = [[grid.tokens for grid in one.grids] for one in sequences]
    predicted = sum(2 * first * len(later) for first, *later in tokens)  # bytes of one layer
    most, fits, components = max(map(len, layers.values())), 0, 0
    for components in COMPONENTS:
        fits = largest // (len(layers) * (components * sum(map(sum, tokens)) + predicted))  # layers of every kind
        if fits >= min(most, ENOUGH):
            break
    return Plan({name: evenly(numbers, fits) for name, numbers in layers.items()}, components) if fits else None


def evenly(values: Sequence[int], most: int) -> list[int]:
    """At most `most` of the values, evenly spread, with the last one."""
    count = min(most, len(values))
    return [values[(k + 1) * len(values) // count - 1] for k in range(count)]


# ---- the truth ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Truth:
    """True tokens, each counted from the first of its frame; `frame` counts the later frames that are shown."""

    token: NDArray[np.uint16]  # [T, F], of each token of the first frame; NOWHERE: hidden, or unknown
    match: NDArray[np.integer]  # [m], the evaluation's correspondences in the shown frames, by place in the predictions
    anchor: NDArray[np.integer]  # [m]
    frame: NDArray[np.integer]  # [m]
    target: NDArray[np.integer]  # [m]
    start: NDArray[np.integer]  # [m], first token of that frame in the sequence


def _truth(
    evaluated: EvaluatedModel,
    dataset: EvaluationSet,
    index: int,
    sample: Sample,
    predictions: Predictions,
    shown: ShownFrames,
) -> _Truth:
    """At the points of the evaluation their true tokens; elsewhere those of tracks from about the token's centre."""
    first = shown.grids[0]
    frames = [dataset.frames(index)[place] for place in shown.places]
    tracks = build_tracks(dataset.scene(index), frames, grid=max(first.rows, first.columns), keep=1.0)
    images = [sample.frames[place] for place in shown.places]
    grids = [evaluated.backbone.frame_grid(image.shape[1], image.shape[0]) for image in images]  # in pixels
    tracked = track_tokens(tracks, grids, np.zeros(len(grids), int))  # [points, F + 1]
    tracked = tracked[tracked[:, 0] >= 0]
    token = np.full((first.tokens, len(frames) - 1), -1)
    token[tracked[:, 0]] = tracked[:, 1:]
    place = np.searchsorted(shown.starts, predictions.target, side="right") - 1  # [M]; in this frame or a later one
    ends = shown.starts + [grid.tokens for grid in shown.grids]
    match = np.flatnonzero((place > 0) & (predictions.target < ends[place]))
    anchor, frame, start = predictions.anchor[match], place[match] - 1, shown.starts[place[match]]
    target = predictions.target[match] - start
    token[anchor] = -1
    token[anchor, frame] = target
    return _Truth(np.where(token < 0, NOWHERE, token).astype(np.uint16), match, anchor, frame, target, start)


# ---- features -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """`S` is about the product of queries and keys, each component times its scale."""

    queries: NDArray[np.int8]  # [T, d]
    keys: NDArray[np.int8]  # [K, d], of all later frames
    scale: NDArray[np.float64]  # [d]
    best: NDArray[np.uint16]  # [T, F], predicted tokens, each counted from the first of its frame
    agreement: float  # share of the queries and frames for which the product is greatest at the predicted token


class _Features:
    """Consumer of a forward pass on one sequence; layers whose features are not finite are left out."""

    def __init__(self, shown: ShownFrames, plan: Plan) -> None:
        self._first, *later = [
            slice(start, start + grid.tokens) for start, grid in zip(shown.starts.tolist(), shown.grids, strict=True)
        ]
        self._later, self._plan = later, plan
        self.found: dict[tuple[str, int], _Layer] = {}

    def __call__(self, kind: Captured, layer: int, queries: Tensor, keys: Tensor) -> None:
        if layer not in self._plan.layers[kind]:
            return
        first = normalize(queries[self._first].float(), dim=1)  # [T, D]
        frames = [first @ normalize(keys[tokens].float(), dim=1).T for tokens in self._later]  # [T, tokens] each
        centred = torch.cat([one - one.mean(1, keepdim=True) for one in frames], 1)  # [T, K]
        if not centred.isfinite().all():
            return
        best = _best(centred, frames)
        left, right, scale = factors(centred, self._plan.components)
        agreement = (_best((left * scale) @ right.T, frames) == best).float().mean()
        self.found[kind, layer] = _Layer(
            left.to(torch.int8).cpu().numpy(),
            right.to(torch.int8).cpu().numpy(),
            scale.double().cpu().numpy(),
            best.cpu().numpy().astype(np.uint16),
            float(agreement),
        )


def _best(similarities: Tensor, frames: Sequence[Tensor]) -> Tensor:
    """The greatest of `[T, K]` in each frame: `[T, F]`, counted from the frame's first token."""
    return torch.stack([one.argmax(1) for one in similarities.split([one.shape[1] for one in frames], 1)], 1)


def factors(matrix: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers from -127 to 127 and scales, `[T, d]`, `[K, d]`, `[d]`, whose product is about the matrix `[T, K]`.

    Half of the components approximate the matrix, the other half the error of the first ones.
    """
    left: list[Tensor] = []
    right: list[Tensor] = []
    scales: list[Tensor] = []
    rest = matrix
    for _ in range(2):
        a, a_scale = _rounded(leading_vectors(rest, components // 2))
        b, b_scale = _rounded(torch.linalg.lstsq(a * a_scale, rest).solution.T)
        left.append(a)
        right.append(b)
        scales.append(a_scale * b_scale)
        rest = rest - (a * scales[-1]) @ b.T
    return torch.cat(left, 1), torch.cat(right, 1), torch.cat(scales)


def leading_vectors(matrix: Tensor, count: int, further: int = 8, rounds: int = 3) -> Tensor:
    """About the `count` leading left singular vectors `[T, count]` of `[T, K]`, by subspace iteration.

    A whole decomposition takes a hundred times as long. `further` vectors make the iteration converge sooner.
    """
    draw = torch.Generator().manual_seed(0)
    basis = torch.randn(matrix.shape[1], count + further, generator=draw).to(matrix)  # [K, c]
    for _ in range(rounds):
        left = torch.linalg.qr(matrix @ basis).Q  # [T, c], or fewer columns where T is less
        basis = matrix.T @ left
    turn = torch.linalg.svd(basis.T @ basis).U  # [c, c], of the left side of basis.T
    return (left @ turn)[:, :count]


def _rounded(values: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers, and the scale of each column."""
    scale = values.abs().amax(0).clamp(min=torch.finfo(values.dtype).tiny) / 127
    return (values / scale).round().clamp(-127, 127), scale


# ---- JSON -----------------------------------------------------------------------------------------------------------


def _as_json(
    dataset: EvaluationSet, index: int, sample: Sample, shown: ShownFrames, truth: _Truth, features: _Features
) -> dict[str, Any]:
    """Arrays are little-endian bytes in base64."""
    images = [sample.frames[place] for place in shown.places]
    of_kinds: dict[str, dict[str, Any]] = {}
    for (name, layer), one in features.found.items():
        of_kinds.setdefault(name, {})[str(layer + 1)] = {
            "queries": packed(one.queries),
            "keys": packed(one.keys),
            "scale": [float(f"{scale:.6g}") for scale in one.scale],
            "best": packed(one.best.astype("<u2")),
            "agreement": round(one.agreement, 4),
        }
    return {
        "scene": dataset.scene_entry(index).name,
        "frames": [dataset.frames(index)[place] for place in shown.places],
        "size": [images[0].shape[1], images[0].shape[0]],
        "images": [base64.b64encode(_jpeg(image)).decode() for image in images],
        "grids": [[grid.columns, grid.rows, *grid.rectangle] for grid in shown.grids],
        "truth": packed(truth.token.astype("<u2")),
        "matches": packed(np.stack([truth.anchor, truth.frame, truth.target], 1).astype("<u2")),  # [m, 3]
        "features": of_kinds,
    }


def packed(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _jpeg(frame: RGBImage) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(frame)
    image.thumbnail((SIDE, SIDE))
    image.save(file, "JPEG", quality=82)
    return file.getvalue()

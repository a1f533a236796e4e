"""Evaluates a model on an evaluation set, and resumes where a stopped evaluation ended.

A batch of sequences passes through the model once. During the forward pass each layer's features are matched and only
the predicted tokens and probabilities are kept. The next batch is decoded meanwhile. The predictions of a sequence
are saved as soon as they exist; the metrics are computed from all of them at the end. Sequences whose frames cannot be
read are left out, named in the report, and tried again when the evaluation is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from gasp_fast.collator import Sample
from gasp_fast.config.limits import check_whole
from gasp_fast.data.errors import one_line
from gasp_fast.loss.config import LEAST_TEMPERATURE, MOST_TEMPERATURE, LossConfig
from gasp_fast.loss.function import PCK_RADIUS

from .dataset import EvaluationSet, EvaluationSetConfig
from .evaluated_model import EvaluatedModel
from .features import KINDS, Kind, Rope
from .matching import Directions
from .predict import Confidence, Predictor
from .predictions import Predictions, PredictionStore
from .report_content import report_content

LARGEST_RADIUS = 1000  # patches


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The evaluation set, and how predictions are made and scored."""

    data: EvaluationSetConfig = field(default_factory=EvaluationSetConfig)
    features: tuple[Kind, ...] = ()  # empty: every kind that the model has; the first leads the report
    rope: Rope = "before"
    direction: Directions = "forward"
    confidence: Confidence = "cosine"  # attention: that of `qk` is a softmax of q.k / sqrt(d)
    radius: float = PCK_RADIUS  # patches, within which a prediction is correct
    temperature: float = LossConfig.temperature
    batch: int = 4  # sequences in one forward pass

    def __post_init__(self) -> None:
        for kind in self.features:
            if kind not in KINDS:
                raise ValueError(f"features = {kind!r} is unknown; choose among {', '.join(KINDS)}")
        for name, choices in (("direction", get_args(Directions)), ("confidence", get_args(Confidence))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r} is unknown; choose among {', '.join(choices)}")
        if self.confidence == "attention" and self.features and "qk" not in self.features:
            raise ValueError("confidence = 'attention' is of queries and keys: add qk to --features, or take cosine")
        if not 0 <= self.radius <= LARGEST_RADIUS:
            raise ValueError(f"radius = {self.radius} must be from 0 to {LARGEST_RADIUS} patches")
        check_whole(self, ("batch",))
        if not LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE:
            raise ValueError(
                f"temperature = {self.temperature} must be from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}"
            )


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: the content of report.json, and the predictions behind it."""

    report: dict[str, Any]
    predictions: list[Predictions]
    layers: dict[str, list[int]]  # of each measured name, from 0


def evaluate(
    evaluated: EvaluatedModel,
    dataset: EvaluationSet,
    config: EvaluationConfig,
    out: Path,
    *,
    fresh: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Runs the model on every sequence without predictions in `out`, then computes the metrics of all sequences."""
    kinds = config.features or tuple(kind for kind in KINDS if kind != "head" or evaluated.heads is not None)
    predictor = Predictor(
        evaluated, kinds, config.rope, config.temperature, direction=config.direction, confidence=config.confidence,
        groups=True,
    )  # fmt: skip
    store = PredictionStore(out, list(predictor.layers))
    if fresh:
        store.remove()
    store.begin(_settings(evaluated, dataset, config, kinds))
    predictions = {index: one for index in range(len(dataset)) if (one := store.load(index)) is not None}
    missing = [index for index in range(len(dataset)) if index not in predictions]
    unreadable: dict[int, str] = {}  # sequence -> reason
    progress(len(predictions), len(dataset))
    for batch in _prefetched(dataset, missing, config.batch):
        samples = {index: sample for index, sample in batch.items() if isinstance(sample, Sample)}
        unreadable |= {index: sample for index, sample in batch.items() if isinstance(sample, str)}
        frames = [dataset.frames(index) for index in samples]
        for index, one in zip(samples, predictor(frames, list(samples.values())), strict=True):
            store.save(index, one)
            predictions[index] = one
        progress(len(predictions) + len(unreadable), len(dataset))
    empty = Predictions.empty({name: len(layers) for name, layers in predictor.layers.items()})
    in_order = [predictions.get(index, empty) for index in range(len(dataset))]
    if reason := _reason_for_no_report(evaluated, dataset, in_order, unreadable):
        store.remove()  # other options may help, and must not be refused
        raise ValueError(reason)
    report = report_content(
        evaluated, dataset, predictor.layers, in_order, unreadable, _how(evaluated, config), config.radius
    )
    return Evaluation(report, in_order, predictor.layers)


def _reason_for_no_report(
    evaluated: EvaluatedModel, dataset: EvaluationSet, predictions: list[Predictions], unreadable: dict[int, str]
) -> str:
    """Why no metrics can be computed; empty if they can."""
    if any(map(len, predictions)):
        for name in predictions[0].confidence:
            undefined = [np.isnan(one.confidence[name]).any(1) for one in predictions]  # [L] each
            if np.any(undefined, axis=0).all():
                return (
                    f"{evaluated.name}: the features {name!r} of every layer are NaN or infinite; check the weights, "
                    "give --dtype float32, or leave these features out with --features"
                )
        return ""
    if unreadable:
        first = min(unreadable)
        return (
            f"{dataset.library}: {len(unreadable)} of {len(dataset)} sequences cannot be read, and in the others no "
            f"query point is visible in a second frame; the first, of {dataset.scene_entry(first).name}: "
            f"{unreadable[first]}"
        )
    return (
        f"{dataset.library}: in none of {len(dataset)} sequences a query point is visible in a second frame; "
        f"check the scenes with gasp-fast scenes {dataset.library}, raise --grid or lower --max-gap"
    )


def _prefetched(dataset: EvaluationSet, indices: list[int], size: int) -> Iterator[dict[int, Sample | str]]:
    """Batches of samples by index, or why they cannot be read.

    A thread decodes the next batch while the caller uses this one.
    """

    def read(batch: list[int]) -> dict[int, Sample | str]:
        samples: dict[int, Sample | str] = {}
        for index in batch:
            try:
                samples[index] = dataset.sample(index)
            except (OSError, ValueError) as error:
                samples[index] = one_line(error)
        return samples

    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(read, indices[:size])
        for start in range(0, len(indices), size):
            samples = pending.result()
            pending = pool.submit(read, indices[start + size : start + 2 * size])
            yield samples


def _settings(
    evaluated: EvaluatedModel, dataset: EvaluationSet, config: EvaluationConfig, kinds: tuple[Kind, ...]
) -> dict[str, Any]:
    """Everything the predictions depend on. Not the radius, by which they are only scored."""
    return {
        **asdict(config.data),
        "features": list(kinds),
        **_how(evaluated, config),
        "model": evaluated.name,
        "weights": evaluated.fingerprint,
        "heads": evaluated.heads_origin,
        **({"base": evaluated.base} if evaluated.base else {}),
        **({"frames_as": evaluated.backbone.frames_as} if evaluated.backbone.frames_as != "images" else {}),
        "dtype": str(next(evaluated.model.parameters()).dtype),
        "scenes": {entry.name: entry.digest for entry in dataset.scenes},
    }


def _how(evaluated: EvaluatedModel, config: EvaluationConfig) -> dict[str, Any]:
    """The settings of the predictions that a report names."""
    return {
        "rope": config.rope,
        "direction": config.direction,
        "confidence": config.confidence,
        "temperature": config.temperature,
        "frame_pixels": evaluated.frame_pixels,
    }

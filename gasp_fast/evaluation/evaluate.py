"""Asking a model where points went: sequence by sequence, layer by layer, resumable.

A batch of sequences goes through the model once. While it runs, each layer's features are compared on the spot
(`features`, `matching`) and only the answers are kept: a token and a probability for each question and layer. The next
batch is decoded and prepared meanwhile. Answers are stored as they come (`store`), and judged at the end (`metrics`).

Knows the parts of this folder and their order; the numbers themselves are made elsewhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gasp_fast.collator import Collator, CollatorConfig, Sample

from .features import KINDS, FeatureTap, Kind, Rope, layers_of
from .matching import Matcher, similarities
from .metrics import summary, within
from .sampling import QuestionConfig, Questions
from .store import Answers, AnswerStore
from .subject import Subject


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is asked, and how answers are taken and judged."""

    questions: QuestionConfig = field(default_factory=QuestionConfig)
    features: tuple[Kind, ...] = ()  # none: every kind the model has; the first is the report's own
    rope: Rope = "before"
    radius: float = 2.0  # patches
    temperature: float = 0.07
    batch: int = 4  # sequences in one forward pass

    def __post_init__(self) -> None:
        for kind in self.features:
            if kind not in KINDS:
                raise ValueError(f"features = {kind!r} is unknown; choose among {', '.join(KINDS)}")
        if self.batch < 1:
            raise ValueError(f"batch = {self.batch}: at least 1 sequence at once")


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: its report as data, and what the pictures need."""

    report: dict[str, Any]
    answers: list[Answers]
    kinds: tuple[Kind, ...]
    layers: dict[Kind, list[int]]  # from 0


def evaluate(
    subject: Subject,
    questions: Questions,
    config: EvaluationConfig,
    folder: Path,
    *,
    fresh: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Answers every question that has no answer in `folder` yet, then judges all of them."""
    kinds = config.features or tuple(kind for kind in KINDS if kind != "head" or subject.heads is not None)
    layers = {kind: layers_of(kind, subject.backbone, subject.heads) for kind in kinds}
    if fresh:
        shutil.rmtree(folder / "answers", ignore_errors=True)
    store = AnswerStore(folder / "answers", _plan(subject, questions, config, kinds), kinds)
    answers = {index: found for index in range(len(questions)) if (found := store.load(index)) is not None}
    missing = [index for index in range(len(questions)) if index not in answers]
    progress(len(answers), len(questions))
    asker = _Asker(subject, config, kinds, layers)
    for indices, asked in _ahead(
        missing, config.batch, lambda index: (questions.frames(index), questions.sample(index))
    ):
        for index, found in zip(indices, asker.ask(asked), strict=True):
            store.save(index, found)
            answers[index] = found
        progress(len(answers), len(questions))
    ordered = [answers[index] for index in range(len(questions))]
    report = _report(subject, questions, config, kinds, layers, ordered)
    return Evaluation(report, ordered, kinds, layers)


def _ahead(indices: Sequence[int], size: int, read: Callable[[int], Any]) -> Iterator[tuple[list[int], list[Any]]]:
    """Batches of indices with what was read for them; the next batch is read while one is worked on."""
    left = iter(indices)
    with ThreadPoolExecutor(1) as pool:
        batch = list(islice(left, size))
        coming = pool.submit(lambda part: [read(index) for index in part], batch)
        while batch:
            following = list(islice(left, size))
            now = coming.result()
            coming = pool.submit(lambda part: [read(index) for index in part], following)
            yield batch, now
            batch = following


class _Asker:
    """Runs batches through the model."""

    def __init__(
        self, subject: Subject, config: EvaluationConfig, kinds: tuple[Kind, ...], layers: dict[Kind, list[int]]
    ) -> None:
        self._subject, self._config, self._kinds, self._layers = subject, config, kinds, layers
        self._collator = Collator(subject.backbone, CollatorConfig(anchors="first"))

    def ask(self, asked: Sequence[tuple[tuple[int, ...], Sample]]) -> list[Answers]:
        nothing = Answers.none({kind: len(layers) for kind, layers in self._layers.items()})
        usable = [place for place, (_, sample) in enumerate(asked) if sample.tracks]
        answers = [nothing] * len(asked)
        if not usable:
            return answers
        batch = self._collator([asked[place][1] for place in usable])
        matches = batch["matches"]
        if not len(matches):
            return answers
        found = self._run(batch)
        ends = matches.frame_offsets[matches.sequence_offsets]  # [B + 1], tokens
        for number, place in enumerate(usable):
            chosen = (matches.anchor >= ends[number]) & (matches.anchor < ends[number + 1])
            answers[place] = self._judge(batch, found, chosen.nonzero()[:, 0], int(ends[number]), asked[place][0])
        return answers

    def _run(self, batch: dict[str, Any]) -> dict[Kind, tuple[Tensor, Tensor]]:
        """One forward pass; the best token and its probability, `[L, M]` on the CPU, of each kind."""
        device = self._subject.device
        matcher = Matcher(batch["matches"], self._config.temperature, device)
        found: dict[Kind, dict[int, tuple[Tensor, Tensor]]] = {kind: {} for kind in self._kinds}

        def answer(kind: Kind, layer: int, queries: Tensor, keys: Tensor) -> None:
            if layer in self._layers[kind]:
                found[kind][layer] = matcher(queries, keys)

        run_features(self._subject, batch, answer, self._kinds, self._config.rope)
        return {
            kind: (
                torch.stack([found[kind][layer][0] for layer in self._layers[kind]]).cpu(),
                torch.stack([found[kind][layer][1].float() for layer in self._layers[kind]]).cpu(),
            )
            for kind in self._kinds
        }

    def _judge(
        self,
        batch: dict[str, Any],
        found: dict[Kind, tuple[Tensor, Tensor]],
        chosen: Tensor,  # int64 [m], the matches of one sequence
        first: int,  # its first token in the batch
        frames: tuple[int, ...],
    ) -> Answers:
        matches = batch["matches"]
        xy = matches.token_xy.numpy()
        anchor, target = matches.anchor[chosen].numpy(), matches.target[chosen].numpy()
        frame_of = torch.searchsorted(matches.frame_offsets[1:].contiguous(), matches.target[chosen], right=True)
        first_frame = int(torch.searchsorted(matches.frame_offsets, torch.tensor(first), right=True)) - 1
        gap = np.asarray(frames)[frame_of.numpy() - first_frame] - frames[0]
        best = {kind: tokens[:, chosen].numpy() for kind, (tokens, _) in found.items()}
        return Answers(
            anchor=anchor - first,
            target=target - first,
            gap=gap,
            moved=~within(xy[anchor], xy[target], self._config.radius),
            best={kind: (tokens - first).astype(np.int32) for kind, tokens in best.items()},
            correct={kind: within(xy[tokens], xy[target], self._config.radius) for kind, tokens in best.items()},
            confidence={kind: sure[:, chosen].numpy() for kind, (_, sure) in found.items()},
        )


def run_features(
    subject: Subject,
    batch: dict[str, Any],
    consumer: Callable[[Kind, int, Tensor, Tensor], None],
    kinds: Sequence[Kind],
    rope: Rope,
) -> None:
    """One forward pass over a collated batch, without logits nobody reads, telling `consumer` each layer's features."""
    skipped = ("matches", "visual_positions", "labels")
    inputs = {name: value.to(subject.device, non_blocking=True) for name, value in batch.items() if name not in skipped}
    positions = batch["visual_positions"].to(subject.device)
    tap = FeatureTap(subject.backbone, subject.model, positions, consumer, kinds, subject.heads, rope)
    subject.backbone.check_inputs(subject.model, inputs)
    with torch.inference_mode(), tap:
        subject.model(**inputs, use_cache=False, logits_to_keep=1)


def heat_maps(
    subject: Subject, sample: Sample, kind: Kind, layer: int, token: int, rope: Rope, temperature: float
) -> list[np.ndarray]:
    """Where one query token of a sample's first frame would be found: probabilities `[rows, columns]` of each frame."""
    batch = Collator(subject.backbone, CollatorConfig(anchors="first"))([sample])
    seen: list[Tensor] = []

    def look(this: Kind, number: int, queries: Tensor, keys: Tensor) -> None:
        if number == layer:
            seen.append(similarities(queries, keys, token, temperature))

    run_features(subject, batch, look, [kind], rope)
    ends = batch["matches"].frame_offsets.tolist()
    maps = []
    for frame, start, end in zip(sample.frames, ends[:-1], ends[1:], strict=True):
        grid = subject.backbone.frame_grid(frame.shape[1], frame.shape[0])
        maps.append(seen[0][start:end].float().softmax(0).reshape(grid.rows, grid.columns).cpu().numpy())
    return maps


def _plan(subject: Subject, questions: Questions, config: EvaluationConfig, kinds: tuple[Kind, ...]) -> dict[str, Any]:
    """Everything the answers depend on."""
    settings = asdict(config)
    del settings["batch"]
    return {
        **settings.pop("questions"),
        **settings,
        "features": list(kinds),
        "model": subject.name,
        "weights": subject.fingerprint,
        "heads": subject.heads_origin,
        "dtype": str(next(subject.model.parameters()).dtype),
        "scenes": {entry.name: entry.digest for entry in questions.scenes},
    }


def _report(
    subject: Subject,
    questions: Questions,
    config: EvaluationConfig,
    kinds: tuple[Kind, ...],
    layers: dict[Kind, list[int]],
    answers: list[Answers],
) -> dict[str, Any]:
    """`report.json`: the figures of the first kind of features at the top, those of every kind under `by_features`."""
    asked = [one for one in answers if len(one.gap)]
    if not asked:
        raise ValueError(
            f"{questions.library}: in none of {len(answers)} sequences a point is seen twice; check the scenes with "
            f"gasp-fast scenes {questions.library}, raise --grid or lower --max-gap"
        )
    by_kind = {
        kind: summary([one.outcomes(kind) for one in asked], [n + 1 for n in layers[kind]], config.questions.max_gap)
        for kind in kinds
    }
    return {
        "model": subject.name,
        "sequences": len(asked),
        "frames": config.questions.frames,
        "grid": config.questions.grid,
        "features": kinds[0],
        **by_kind[kinds[0]],
        "questions": sum(len(one.gap) for one in asked),
        "sequences_without_tracks": len(answers) - len(asked),
        "scenes": [entry.name for entry in questions.scenes],
        "heads": subject.heads_origin,
        "settings": {
            **{name: getattr(config.questions, name) for name in ("max_gap", "keep", "held_out", "seed")},
            "rope": config.rope,
            "radius": config.radius,
            "temperature": config.temperature,
        },
        "by_features": by_kind,
    }

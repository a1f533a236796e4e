"""Scores and paired intervals from lmms-eval's verdicts on the answers.

A score is a weighted mean over questions. The weights follow from the groups of the benchmark: where a score is the
mean of the means of groups, a question of a small group has a large weight.

`paired` prepares the scores for lmms-eval's paired t-test, which has no weights. Of n questions with weights w, and the
benchmark's score S, a question's score x becomes S + n w (x - S). The mean of these is S. Where all weights are equal,
the scores stay as they are; where all questions have the same score there is no spread, however the weights differ.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .suites import Benchmark, Path

CLOSE = 1e-5  # lmms-eval rounds some scores to five or six digits


@dataclass(frozen=True)
class Judged:
    """The verdict on one answer."""

    question: tuple[str, int]  # task, number
    score: float
    unit: float  # what the question counts: the score of a group is the sum of scores by the sum of units
    group: Path
    category: str


def judged(benchmark: Benchmark, task: str, samples: Sequence[Mapping[str, Any]]) -> list[Judged]:
    found = []
    for sample in samples:
        verdict = sample[benchmark.metric]
        category = benchmark.category(verdict) if benchmark.category else task
        question = (task, int(sample["question"]))
        score, unit = benchmark.score(verdict), benchmark.unit(verdict)
        found.append(Judged(question, score, unit, benchmark.group(verdict), category))
    return found


def weights(answers: Sequence[Judged]) -> list[float]:
    """The weight of each answer in the score, which is the sum of the weighted scores."""
    result = [0.0] * len(answers)
    _share(answers, list(range(len(answers))), 0, 1.0, result)
    return result


def _share(answers: Sequence[Judged], members: Sequence[int], depth: int, share: float, result: list[float]) -> None:
    """Divide `share` among the groups at this depth, equally, or among questions, by their units."""
    groups: dict[str, list[int]] = defaultdict(list)
    for at in members:
        path = answers[at].group
        groups[path[depth] if len(path) > depth else ""].append(at)
    if set(groups) <= {""}:
        total = sum(answers[at].unit for at in members)
        for at in members:
            result[at] = share / total
        return
    for group in groups.values():
        _share(answers, group, depth + 1, share / len(groups), result)


def score(answers: Sequence[Judged]) -> float:
    return math.fsum(weight * one.score for weight, one in zip(weights(answers), answers, strict=True))


def categories(answers: Sequence[Judged]) -> dict[str, float]:
    """The score of each category by itself, in the order of their names."""
    by_name: dict[str, list[Judged]] = defaultdict(list)
    for one in answers:
        by_name[one.category].append(one)
    return {name: score(by_name[name]) for name in sorted(by_name)}


def check_against_lmms_eval(
    benchmark: Benchmark, task: str, answers: Sequence[Judged], stated: Mapping[str, Any]
) -> None:
    """Raise if the score of one task is not that of lmms-eval."""
    theirs = stated.get(benchmark.overall or benchmark.metric)
    if theirs is None or math.isnan(theirs):
        return
    ours = score([one for one in answers if one.question[0] == task])
    if abs(ours - theirs / benchmark.scale) > CLOSE:
        raise ValueError(
            f"{task}: lmms-eval's score is {theirs / benchmark.scale:.6f}, but its verdicts give {ours:.6f}; "
            "this is a bug of gasp_fast"
        )


def paired(ours: Sequence[Judged], base: Sequence[Judged]) -> tuple[list[float], list[float]]:
    """For each question that both answered, both scores, prepared for a paired t-test."""
    others = {one.question: one for one in base}
    both = [one for one in ours if one.question in others]
    return _prepared(both), _prepared([others[one.question] for one in both])


def _prepared(answers: Sequence[Judged]) -> list[float]:
    whole = score(answers)
    factors = [len(answers) * weight for weight in weights(answers)]
    return [whole + factor * (one.score - whole * one.unit) for factor, one in zip(factors, answers, strict=True)]

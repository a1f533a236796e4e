"""VSI-Bench, also of a part of its questions, and with a textual prior.

lmms-eval's task `vsibench` stops where there is no question of one of the kinds of relative direction, as in a trial
with the first few questions. Prompts and judgements are the same here.

The prior is the average size of each kind of object, and of the rooms, at the end of the prompt. The averages are of
VSI-Bench's own answers, so this is a probe of bias, not a way to answer: what a model gains from them it could have
guessed without looking.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any

from lmms_eval.tasks.vsibench import utils as upstream

OBJECT = re.compile(r"\(length, width, or height\) of the (.+?), measured in centimeters")

doc_to_visual = upstream.vsibench_doc_to_visual
process_results = upstream.vsibench_process_results
doc_to_text = upstream.vsibench_doc_to_text
DIRECTIONS = {f"object_rel_direction_{kind}" for kind in ("easy", "medium", "hard")}


def overall(results: list[dict[str, Any]]) -> float:
    """lmms-eval's score; undefined for a part without one of its kinds of relative direction."""
    if {one["question_type"] for one in results} >= DIRECTIONS:
        return float(upstream.vsibench_aggregate_overall(results))
    return float("nan")


def with_prior(dataset: Any) -> Any:
    """Each question with the prior, as a column: lmms-eval loads this module again for every function of the task."""
    text = prior_of(dataset)
    return dataset.map(lambda _: {"prior": text})


def prior_of(questions: Iterable[Mapping[str, Any]]) -> str:
    """A sentence with the averages, objects in the order of the alphabet."""
    sizes, rooms = defaultdict(list), []
    for one in questions:
        if one["question_type"] == "room_size_estimation":
            rooms.append(float(one["ground_truth"]))
        elif one["question_type"] == "object_size_estimation" and (named := OBJECT.search(one["question"])):
            sizes[named[1]].append(float(one["ground_truth"]))
    known = [f"{name} {mean(values):.0f} cm" for name, values in sorted(sizes.items())]
    sentences = []
    if known:
        sentences.append(f"The longest dimension of an object is on average: {', '.join(known)}.")
    if rooms:
        sentences.append(f"A room has on average {mean(rooms):.1f} square meters.")
    return " ".join(sentences)


def text_with_prior(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    return f"{upstream.vsibench_doc_to_text(doc, lmms_eval_specific_kwargs)}\n{doc['prior']}"

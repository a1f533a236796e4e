"""TempCompass without a network.

Where lmms-eval's rule cannot read an answer, it asks a language model of an online service. Here such an answer is
undecided: it counts as wrong, and the metric `undecided` counts it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmms_eval.tasks.tempcompass import utils as upstream

Judged = dict[str, Any]


def leave_undecided(*_: Any, **__: Any) -> tuple[str, int]:
    """In place of the service: its words, and 0 for wrong."""
    return "undecided", 0


upstream.get_eval_result = leave_undecided

doc_to_visual = upstream.tempcompass_doc_to_visual
doc_to_answer = upstream.tempcompass_doc_to_answer
text_multi_choice = upstream.tempcompass_doc_to_text_multi_choice
text_yes_no = upstream.tempcompass_doc_to_text_yes_no
text_caption_matching = upstream.tempcompass_doc_to_text_caption_matching


def judged(rule: Callable[..., Judged], doc: dict[str, Any], results: list[str]) -> Judged:
    found = rule(doc, results)
    return {**found, "undecided": int(not found["avg_accuracy"]["match_success"])}


def judge_multi_choice(doc: dict[str, Any], results: list[str]) -> Judged:
    return judged(upstream.tempcompass_process_results_multi_choice, doc, results)


def judge_yes_no(doc: dict[str, Any], results: list[str]) -> Judged:
    return judged(upstream.tempcompass_process_results_yes_no, doc, results)


def judge_caption_matching(doc: dict[str, Any], results: list[str]) -> Judged:
    return judged(upstream.tempcompass_process_results_caption_matching, doc, results)


def accuracy(results: list[dict[str, Any]]) -> float:
    return float(upstream.tempcompass_aggregate_rating(results, None))


def count(results: list[int]) -> int:
    return sum(results)

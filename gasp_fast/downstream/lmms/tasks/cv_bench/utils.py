"""CV-Bench with its official score: half the mean of ADE20K's and COCO's accuracy, half that of Omni3D."""

from __future__ import annotations

from typing import Any

from lmms_eval.tasks.cv_bench import utils as upstream


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return list(upstream.cv_bench_doc_to_visual(doc))


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    return str(upstream.cv_bench_doc_to_text(doc, lmms_eval_specific_kwargs))


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    judged = upstream.cv_bench_process_results(doc, results)["cv_bench_acc"]
    return {"cv_bench_official": judged, "cv_bench_acc": judged}


def official(results: list[dict[str, Any]]) -> float:
    """A source without a question is left out; lmms-eval's function stops there."""
    if {"ADE20K", "COCO", "Omni3D"} <= {one["source"] for one in results}:
        return float(upstream.cv_bench_default_aggregate_results(results))
    return float("nan")


def accuracy(results: list[dict[str, Any]]) -> float:
    return float(upstream.cv_bench_aggregate_results(results))

"""Checks the content of a `report.json` that is not trusted: all that tables, figures and pictures read of it."""

from __future__ import annotations

import math
from typing import Any

from .tables import KIND_NAMES

# In `by_features`, one number or null for each entry of `layers`, or of `temporal.gaps`.
_PER_LAYER = (
    ("pck", "per_layer"), ("pck", "per_layer_std"), ("pck_moved", "per_layer"), ("rho", "per_layer"),
    ("rho", "per_layer_std"),
)  # fmt: skip
_PER_GAP = ("pck", "pck_std", "normalized", "identity")
# Not in reports of earlier versions.
_PER_LAYER_SINCE = (("most_frequent", "per_layer"), ("delta_avg", "per_layer"))
_NUMBERS_SINCE = (
    ("pck", "chance"), ("pck", "constant"), ("pck_moved", "chance"), ("pck_moved", "constant"),
    ("delta_avg", "ceiling"), ("pck_groups", "peak"),
)  # fmt: skip
_PER_SEQUENCE = ("best_layer", "mean", "moved")


def check_report(report: dict[str, Any]) -> None:
    """Raises a `ValueError`, `KeyError`, `TypeError` or `AttributeError` unless the report is complete."""
    check(isinstance(report["model"], str), "model")
    check(isinstance(report.get("run", ""), str), "run")
    for name in ("sequences", "frames", "grid", "sequences_without_tracks"):
        check(is_count(report[name]), name)
    check(report["features"] in report["by_features"], "features")
    for name in ("max_gap", "seed", "keep", "held_out"):
        check(is_number(report["settings"][name]), f"settings.{name}")
    check(is_number(report["settings"].get("radius", 0)), "settings.radius")
    for one in report.get("unreadable", {}).get("sequences", []):
        check(is_count(one["sequence"]), "unreadable.sequences")
    for name, digest in report.get("scene_digests", {}).items():
        check(isinstance(name, str) and isinstance(digest, str), "scene_digests")
    for grid in report.get("token_grids", []):
        check(is_count(grid["rows"]) and is_count(grid["columns"]), "token_grids")
    for one in report.get("evaluated", []):
        check(isinstance(one["scene"], str) and all(map(is_count, one["frames"])), "evaluated")
    for kind, metrics in report["by_features"].items():
        check(kind in KIND_NAMES, f"by_features.{kind[:20]}")
        _check_metrics(metrics)
        _check_later_metrics(metrics)
        if "evaluated" in report:
            for name in _PER_SEQUENCE:
                _check_row(metrics["per_sequence"][name], len(report["evaluated"]), f"per_sequence.{name}")


def _check_metrics(metrics: dict[str, Any]) -> None:
    layers, temporal = metrics["layers"], metrics["temporal"]
    gaps = temporal["gaps"]
    for name, numbers in (("layers", layers), ("temporal.gaps", gaps)):
        check(isinstance(numbers, list) and bool(numbers) and all(map(is_count, numbers)), name)
    for group, name in _PER_LAYER:
        _check_row(metrics[group][name], len(layers), f"{group}.{name}")
    for name in _PER_GAP:
        _check_row(temporal[name], len(gaps), f"temporal.{name}")
    _check_row(temporal["mean_over_layers"]["normalized"], len(gaps), "temporal.mean_over_layers")
    check(gaps == list(range(1, len(gaps) + 1)), "temporal.gaps")
    for name, layer in (("pck.peak_layer", metrics["pck"]["peak_layer"]), ("temporal.layer", temporal["layer"])):
        check(is_count(layer) and layer in layers, name)
    for name, value in (("identity", metrics["identity"]), ("pck", metrics["pck"]["peak"])):
        check(is_number(value), name)
    _check_row([metrics["pck"]["mean"]], 1, "pck.mean")


def _check_later_metrics(metrics: dict[str, Any]) -> None:
    """Those that reports of earlier versions do not have."""
    for group, name in _PER_LAYER_SINCE:
        if group in metrics:
            _check_row(metrics[group][name], len(metrics["layers"]), f"{group}.{name}")
    for group, name in _NUMBERS_SINCE:
        _check_row([metrics.get(group, {}).get(name)], 1, f"{group}.{name}")


def _check_row(values: Any, length: int, name: str) -> None:
    whole = isinstance(values, list) and len(values) == length
    check(whole and all(value is None or is_number(value) for value in values), name)


def check(sound: bool, name: str) -> None:
    if not sound:
        raise ValueError(f"{name} is damaged")


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e12 and math.isfinite(value)

"""Differences between reports on the same sequences, with a bootstrap interval.

Sequences are paired, so that what makes a sequence easy or hard for all models cancels. The paired differences are
drawn with replacement, as many as there are, and averaged, 10,000 times with a fixed seed; the interval holds the
middle 95 % of these means. Sequences of one scene resemble each other: with few scenes the interval is too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .tables import Report, pck_name

RESAMPLES = 10_000
METRICS = {"best_layer": "{pck}", "mean": "mean", "moved": "moved"}  # as the columns of the table
# What makes sequences of the same frames the same questions.
_SAME = ("grid", "settings.keep")


@dataclass(frozen=True)
class Difference:
    """Mean of the second report's value minus that of the first, over paired sequences, and its 95 % interval."""

    features: str
    metric: str  # a key of METRICS
    first: str
    second: str
    sequences: int
    difference: float
    low: float
    high: float


def bootstrap(differences: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """The mean of paired differences, and the 2.5 % and 97.5 % quantiles of the means of `resamples` resamples."""
    values = np.asarray(differences, np.float64)  # [B]
    draw = np.random.default_rng(seed)
    means = [values[draw.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def paired_differences(reports: Mapping[str, Report], kinds: Sequence[str]) -> tuple[list[Difference], list[str]]:
    """Each report's difference from the first, for each kind and metric; and why some reports have none."""
    (first, baseline), *others = reports.items()
    found, left_out = [], []
    for second, report in others:
        if reason := _why_not(baseline, report):
            left_out.append(f"no paired differences between {first} and {second}: {reason}")
            continue
        for kind in kinds:
            for metric in METRICS:
                pairs = [(a, b) for a, b in _paired(baseline, report, kind, metric) if a is not None and b is not None]
                if len(pairs) > 1:
                    interval = bootstrap([b - a for a, b in pairs])
                    found.append(Difference(kind, metric, first, second, len(pairs), *interval))
    return found, left_out


def difference_rows(differences: Sequence[Difference], reports: Mapping[str, Report]) -> list[list[str]]:
    """A row of headings, then one for each difference."""
    rows = [["difference", "features", "metric", "sequences", "mean", "95 % interval"]]
    for one in differences:
        metric = METRICS[one.metric].format(pck=pck_name(reports))
        interval = f"{one.low:+.3f} to {one.high:+.3f}"
        pair = f"{one.second} − {one.first}"
        rows.append([pair, one.features, metric, str(one.sequences), f"{one.difference:+.3f}", interval])
    return rows


def as_json(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    return [asdict(one) for one in differences]


def _why_not(first: Report, second: Report) -> str:
    if "evaluated" not in first or "evaluated" not in second:
        return "a report of an earlier version does not name its sequences; run gasp-fast evaluate again"
    for name in _SAME:
        a, b = (_value(report, name) for report in (first, second))
        if a != b:
            return f"they have other query points ({name.removeprefix('settings.')} = {a} and {b})"
    if shared_digests(first, second) != shared_digests(second, first):
        return "scenes of the same name have other frames, poses or cameras; evaluate both on the same scenes"
    if len(_places(first).keys() & _places(second).keys()) < 2:
        return "they share fewer than 2 sequences; evaluate both with the same scenes and options"
    return ""


def shared_digests(report: Report, other: Report) -> dict[str, str]:
    """The digests of the scenes that both reports have. Reports of earlier versions have none."""
    theirs = other.get("scene_digests", {})
    return {name: digest for name, digest in report.get("scene_digests", {}).items() if name in theirs}


def _value(report: Report, name: str) -> Any:
    group, _, key = name.rpartition(".")
    return (report[group] if group else report)[key]


def _paired(first: Report, second: Report, kind: str, metric: str) -> list[tuple[float | None, float | None]]:
    """The values of the sequences that both reports have."""
    a, b = (report["by_features"][kind]["per_sequence"][metric] for report in (first, second))
    places = _places(second)
    return [(a[at], b[places[key]]) for key, at in _places(first).items() if key in places]


def _places(report: Report) -> dict[tuple[Any, ...], int]:
    """Where a report has each of its sequences, by scene and frames. A repeated one counts once."""
    return {(one["scene"], *one["frames"]): at for at, one in enumerate(report["evaluated"])}

"""When a GPU has nothing to do in a step: the pauses between its kernels, by the two kernels around them.

The profile for it holds the GPU's activities only. One with the host's operations, as in `step_profile.py`, slows the
host down so much that the GPU waits for it where it otherwise would not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

NAME = 60  # characters of a kernel's name that are kept
MOST = 30  # pairs of kernels that are listed


class Activity(NamedTuple):
    """A kernel or a copy; times in nanoseconds."""

    start: int
    end: int
    name: str


@contextmanager
def activities_recorded() -> Iterator[list[Activity]]:
    """Filled on leaving, in the order of their starts. Empty without a GPU."""
    found: list[Activity] = []
    if not torch.cuda.is_available():
        yield found
        return
    with profile(activities=[ProfilerActivity.CUDA]) as measured:
        yield found
        torch.cuda.synchronize()
    results: Any = measured.profiler
    for event in results.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            found.append(Activity(event.start_ns(), event.start_ns() + event.duration_ns(), event.name()))
    found.sort()


def pauses(activities: Iterable[Activity], most: int = MOST) -> dict[str, Any]:
    """Seconds from the first to the last activity, and those without any; the pauses that take most of these.

    A pair of kernels has the milliseconds of all its pauses, their number, and the longest one.
    """
    of_pair: dict[tuple[str, str], list[int]] = defaultdict(list)
    first = end = None
    before = ""
    for activity in activities:
        if first is None or end is None:
            first = end = activity.start
        elif activity.start > end:
            of_pair[before, activity.name[:NAME]].append(activity.start - end)
        if activity.end > end:
            end, before = activity.end, activity.name[:NAME]
    longest = sorted(of_pair.items(), key=lambda pair: -sum(pair[1]))
    return {
        "span_seconds": 0.0 if first is None or end is None else (end - first) / 1e9,
        "idle_seconds": sum(map(sum, of_pair.values())) / 1e9,
        "pauses": [[*pair, sum(spans) / 1e6, len(spans), max(spans) / 1e6] for pair, spans in longest[:most]],
    }

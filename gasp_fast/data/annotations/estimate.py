"""Estimates time and bytes of annotations from the first sequences of a run, which are computed and thrown away."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from .settings import AnnotationSettings
from .shard import shard_arrays
from .write import SequenceTracks

# Sequences of a scene share decoded frames, so the first ones take longer than the others. In this time most frames of
# a scene are decoded.
SECONDS = 5.0


@dataclass(frozen=True)
class Estimate:
    """What one process measured on `sequences` sequences."""

    sequences: int
    seconds: float
    bytes: int

    def seconds_for(self, sequences: int, workers: int) -> float:
        return self.seconds / self.sequences * sequences / workers

    def bytes_for(self, sequences: int) -> float:
        return self.bytes / self.sequences * sequences


def measure(
    library: Path, settings: AnnotationSettings, numbers: Sequence[int], seconds: float = SECONDS
) -> Estimate | None:
    """Computes the sequences of one scene, or as many as fit in `seconds`; None if none has tracks.

    They are the first of the shards `numbers`. Sequences that cannot be computed are left out.
    """
    tracker = SequenceTracks(library, settings)
    scenes, tracks = [], []
    began = time.perf_counter()
    for index in chain.from_iterable(map(settings.sequences_in_shard, numbers)):
        scene, found, failure = tracker.compute(index)
        if not failure:
            scenes.append(scene)
            tracks.append(found)
        if len(tracks) == settings.sequences.per_scene or time.perf_counter() - began > seconds:
            break
    if not tracks:
        return None
    size = sum(array.nbytes for array in shard_arrays(scenes, tracks).values())
    return Estimate(len(tracks), time.perf_counter() - began, size)

"""Corrections from a measured step.

The factor of a part is its measured over its estimated time. The host has one if the GPU waited for it, or if the step
was shorter than the host's estimate.
`benchmarks/step.py` writes the factors into a file, and `gasp-fast plan --measured` reads them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gasp_fast.files import read_json

from .assumptions import Assumptions
from .gpus import GPU
from .micro_batch_time import host_seconds, seconds_of
from .shapes import ModelShape
from .step_time import optimiser_seconds
from .training_setup import SequenceSize, TrainingSetup
from .work import work_of_micro_batch, work_of_sequence

LATE = 1.02  # a step this much longer than its kernels waited for the host


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """An optimiser step of one GPU."""

    seconds: float
    micro_batches: Sequence[Sequence[SequenceSize]]
    parts: dict[str, float]  # seconds of the GPU by part, profiled


def calibrate(setup: TrainingSetup, gpu: GPU, step: MeasuredStep) -> dict[str, float]:
    """The factor of each part of the step that an estimate with `Assumptions()` knows."""
    assumed = Assumptions()
    estimated = {"optimiser": optimiser_seconds(setup, 1, gpu, assumed)}
    for sequences in step.micro_batches:
        work = [one for size in sequences for one in work_of_sequence(setup, size)] + work_of_micro_batch(setup)
        for part, seconds in seconds_of(setup, work, gpu, assumed).items():
            estimated[part] = estimated.get(part, 0.0) + seconds
    busy = sum(step.parts.values())
    known = sum(seconds for part, seconds in step.parts.items() if estimated.get(part))
    # A profiler slows a step down, so its parts may add up to more than the step took without it. What belongs to no
    # part is spread over all of them.
    scale = min(busy, step.seconds) / known
    factors = {part: scale * step.parts[part] / estimated[part] for part in step.parts if estimated.get(part)}
    host = step.seconds / (len(step.micro_batches) * host_seconds(setup, assumed))
    if step.seconds > LATE * busy or host < 1:  # or it kept ahead, and took no longer than the step
        factors["host"] = host
    return factors


def read_measured(path: str | os.PathLike[str], shape: ModelShape) -> tuple[Assumptions, str]:
    """Assumptions with the factors of the file's first calibrated step of a model of this shape, and its name."""
    path = Path(path)
    try:
        result: dict[str, Any] = read_json(path)
        cases = [case for case in result["cases"] if case.get("factors")]
        fitting = [case for case in cases if case["shape"] == asdict(shape)]
        names = ", ".join(str(case["name"]) for case in cases) or "none"
        for case in fitting[:1]:
            origin = f"{case['name']} on {result['machine']}, {result['date']}"
            factors = {str(part): float(factor) for part, factor in case["factors"].items()}
            if not all(0 < factor < math.inf for factor in factors.values()):
                raise ValueError("a factor is not a positive number")
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"--measured {path} cannot be read ({reason}); benchmarks/step.sh writes one") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise ValueError(f"--measured {path} is no result of benchmarks/step.py") from None
    if not fitting:
        raise ValueError(
            f"--measured {path} has no calibrated step of a model of this shape ({names}); measure one with "
            "benchmarks/step.sh, or plan without it"
        )
    return replace(Assumptions(), factors=factors), origin

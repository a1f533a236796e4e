"""Efficiencies from a measured step.

The efficiency of a part is its estimated time at full speed divided by its measured time. `idle` is the time of the
step beyond that of all parts, as a share of it. `benchmarks/step.py` writes the efficiencies into a file, and
`gasp-fast plan --measured` reads them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .assumptions import Assumptions
from .gpus import GPU
from .shapes import ModelShape
from .step_time import optimiser_seconds, sequence_seconds
from .training_setup import SequenceSize, TrainingSetup

FULL_SPEED = Assumptions(
    decoder=1, attention=1, adapters=1, vision=1, heads=1, loss=1, bandwidth=1, optimiser=1, idle=0
)  # fmt: skip
# Efficiency -> the parts of a step that it applies to.
PARTS = {
    "decoder": ("decoder", "lm head"),
    "attention": ("attention",),
    "adapters": ("adapters",),
    "vision": ("vision",),
    "heads": ("heads",),
    "loss": ("geometric loss",),
    "bandwidth": ("norms, activations", "rest"),
}


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """An optimiser step of one GPU."""

    seconds: float
    accumulation: int  # micro-batches of it
    sequences: Sequence[SequenceSize]  # of the micro-batch that was profiled
    parts: dict[str, float]  # seconds of that micro-batch by part, and "optimiser", which comes once a step


def calibrate(setup: TrainingSetup, gpu: GPU, step: MeasuredStep) -> dict[str, float]:
    """The fields of `Assumptions` that the step determines."""
    optimiser = step.parts.get("optimiser", 0.0)
    busy = step.accumulation * (sum(step.parts.values()) - optimiser) + optimiser
    # A profiler slows a step down, so its parts may add up to more than the step took without it.
    scale = min(1.0, step.seconds / busy)
    ideal: dict[str, float] = {}
    for sequence in step.sequences:
        for part, value in sequence_seconds(setup, sequence, gpu, FULL_SPEED).items():
            ideal[part] = ideal.get(part, 0.0) + value
    measured = {"idle": step.seconds / (scale * busy) - 1}
    for field, parts in PARTS.items():
        took = scale * sum(step.parts.get(part, 0.0) for part in parts)
        needed = sum(ideal.get(part, 0.0) for part in parts)
        if took and needed:
            measured[field] = needed / took
    if optimiser:
        measured["optimiser"] = optimiser_seconds(setup, 1, gpu, FULL_SPEED) / (scale * optimiser)
    return measured


def read_measured(path: str | os.PathLike[str], shape: ModelShape) -> tuple[Assumptions, str]:
    """Assumptions with the efficiencies of the file's first calibrated step of a model of this shape, and its name."""
    path = Path(path)
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        cases = [case for case in result["cases"] if case.get("assumptions")]
        fitting = [case for case in cases if case["shape"] == asdict(shape)]
    except OSError as error:
        raise OSError(f"--measured {path} cannot be read ({error.strerror}); benchmarks/step.sh writes one") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--measured {path} is no result of benchmarks/step.py") from None
    if not fitting:
        names = ", ".join(case["name"] for case in cases) or "none"
        raise ValueError(
            f"--measured {path} has no calibrated step of a model of this shape ({names}); measure one with "
            "benchmarks/step.sh, or plan without it"
        )
    case = fitting[0]
    return replace(Assumptions(), **case["assumptions"]), f"{case['name']} on {result['machine']}, {result['date']}"

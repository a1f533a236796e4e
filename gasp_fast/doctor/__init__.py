"""`gasp-fast doctor`: checks of this machine and this installation, grouped by what they are needed for.

A check is a generator of findings; `examine` runs them all. The modules here import only Python's standard library and
`packaging` at the top: torch, NumPy and our extensions are what is examined, so each check imports them itself.

    finding.py    the result of a check
    installed.py  metadata of installed packages; the pip command that installs
    packages.py   Python, gasp-fast and the packages that it requires
    hardware.py   processor, memory, disk, cache of models, compilers
    trials.py     compiled code, run on a tiny input; the loss against float64
    gpu.py        driver, devices, Triton, and packages that need a GPU
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial

from gasp_fast.files import one_line

from . import gpu, hardware, packages, trials
from .finding import BROKEN, MISSING, OK, Finding

LOSS_SELF_TEST = "loss self-test"  # name of the finding that says whether the loss works

GROUPS: dict[str, tuple[Callable[[], Iterator[Finding]], ...]] = {
    "machine": (packages.installation, packages.python, hardware.processor, hardware.memory, hardware.disk),
    "loss": (
        partial(packages.of_extra, ""),
        trials.rows_extension,
        partial(trials.loss_against_float64, LOSS_SELF_TEST),
    ),
    "scenes and data": (partial(packages.of_extra, "data"), trials.tracks_extension, trials.render_extension),
    "training": (
        partial(packages.of_extra, "train"),
        trials.processors_alone,
        trials.process_groups,
        hardware.deepspeed_compilers,
        hardware.model_cache,
    ),
    "evaluation": (partial(packages.of_extra, "eval"),),
    "GPU": (
        gpu.driver,
        gpu.torch_build,
        gpu.devices,
        gpu.triton,
        gpu.loss_on_device,
        gpu.attention_and_layers,
        gpu.layers_in_use,
    ),
}


def examine() -> Iterator[tuple[str, Finding]]:
    """Runs every check; yields (group, finding) as they come."""
    for group, checks in GROUPS.items():
        for check in checks:
            for finding in _guarded(check):
                yield group, finding


def loss_works(findings: list[Finding]) -> bool:
    return any(finding.name == LOSS_SELF_TEST and finding.state == OK for finding in findings)


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The check's findings, without the warnings of libraries. An exception becomes a finding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from check()
    except ModuleNotFoundError as error:  # reported by the check of that package
        yield Finding(MISSING, _name(check), f"cannot be checked without {error.name}")
    except Exception as error:  # a broken environment may raise anything; the other checks still run
        yield Finding(BROKEN, _name(check), one_line(error))


def _name(check: Callable[[], Iterator[Finding]]) -> str:
    return str(getattr(check, "func", check).__name__).replace("_", " ")


__all__ = ["BROKEN", "GROUPS", "LOSS_SELF_TEST", "MISSING", "OK", "Finding", "examine", "loss_works"]

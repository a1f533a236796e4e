"""What this machine and this environment can do, in findings grouped by what somebody wants to do with them.

Every page here works where only Python's own library is certain to be there: torch, NumPy and our extensions are things
to be examined, so they are imported inside the checks. A check is a generator of findings. `examine` runs them all; a
check that fails by itself is a finding too.

    finding.py    what a check says
    versions.py   whether a version lies in a range
    installed.py  what the metadata of installed packages say; the command that installs
    packages.py   Python, gasp-fast and the packages it asks for
    hardware.py   processor, memory, disk, cache of models
    trials.py     what is compiled, tried on something tiny; the loss against float64
    gpu.py        driver, devices, Triton, what is only of use on a GPU
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial

from . import gpu, hardware, packages, trials
from .finding import BROKEN, MISSING, OK, Finding, told

LOSS_SELF_TEST = "loss"  # the name of the finding that tells whether the loss alone works

GROUPS: dict[str, tuple[Callable[[], Iterator[Finding]], ...]] = {
    "this machine": (packages.installation, packages.python, hardware.processor, hardware.memory, hardware.disk),
    "the loss alone": (
        partial(packages.of_extra, ""),
        trials.rows_extension,
        partial(trials.loss_against_float64, LOSS_SELF_TEST),
    ),
    "scenes and data": (partial(packages.of_extra, "data"), trials.tracks_extension, trials.render_extension),
    "training": (
        partial(packages.of_extra, "train"),
        trials.process_groups,
        hardware.deepspeed_compilers,
        hardware.model_cache,
    ),
    "evaluation": (partial(packages.of_extra, "eval"),),
    "on a GPU": (
        gpu.driver,
        gpu.torch_build,
        gpu.devices,
        gpu.triton,
        gpu.loss_on_device,
        gpu.cuda_kernels,
        gpu.attention_and_layers,
    ),
}


def examine() -> Iterator[tuple[str, Finding]]:
    """(group, finding), one after the other as they are found."""
    for group, checks in GROUPS.items():
        for check in checks:
            for finding in _guarded(check):
                yield group, finding


def loss_works(findings: list[Finding]) -> bool:
    return any(finding.name == LOSS_SELF_TEST and finding.state == OK for finding in findings)


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The check's findings, without the warnings of libraries; whatever it dies of is a finding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from check()
    except ModuleNotFoundError as error:  # that it is not there is a finding of its own
        yield Finding(MISSING, _name(check), f"cannot be looked at without {error.name}")
    except Exception as error:  # anything may be wrong with an environment; the other checks shall still be made
        yield Finding(BROKEN, _name(check), told(error))


def _name(check: Callable[[], Iterator[Finding]]) -> str:
    return str(getattr(check, "func", check).__name__).replace("_", " ")


__all__ = ["BROKEN", "GROUPS", "LOSS_SELF_TEST", "MISSING", "OK", "Finding", "examine", "loss_works"]

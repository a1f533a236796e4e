"""Python, gasp-fast itself and the packages it asks for: there, in range, beside what they want, and working."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from . import installed, trials
from .finding import BROKEN, MISSING, OK, Finding, told
from .installed import OURS
from .versions import satisfies


def installation() -> Iterator[Finding]:
    ours = installed.find(OURS)
    if ours is None:
        found = "not installed (runs from its source): which packages it asks for is not known"
        yield Finding(MISSING, OURS, found, installed.install_command())
        return
    source = installed.source_of(ours)
    where = f"{ours.version}, from {source}" if source else ours.version
    metadata = Path(str(ours.locate_file(""))) / f"gasp_fast-{ours.version}.dist-info" / "METADATA"
    project = source / "pyproject.toml" if source else None
    if project and project.is_file() and metadata.is_file() and project.stat().st_mtime > metadata.stat().st_mtime:
        where += ", whose pyproject.toml is newer: the ranges below may be out of date"
        yield Finding(MISSING, OURS, where, installed.install_command())
    else:
        yield Finding(OK, OURS, where)


def python() -> Iterator[Finding]:
    ours = installed.find(OURS)
    wanted = (ours.metadata["Requires-Python"] or "") if ours else ""
    fits = satisfies(platform.python_version(), wanted)
    found = f"{platform.python_version()}, {sys.executable}"
    yield Finding(OK if fits else BROKEN, "Python", found if fits else f"{found}; gasp-fast needs {wanted}")


def of_extra(extra: str) -> Iterator[Finding]:
    """A finding for each package that `gasp-fast[extra]` adds itself; the empty extra is what is always needed."""
    for requirement in installed.requirements(OURS):
        if requirement.extra == extra and requirement.name != OURS:
            yield package(requirement.name, requirement.range, installed.install_command(extra), needed=not extra)


def package(name: str, wanted: str, cure: str, needed: bool = False) -> Finding:
    """Whether it is there, in range, beside the versions that it wants itself, and works as far as that is tried."""
    there, asked = installed.find(name), f" (needs {wanted})" if wanted else ""
    if not installed.has_module(name):
        if there:
            return Finding(BROKEN, name, f"{there.version} is recorded as installed, but its files are not there", cure)
        return Finding(BROKEN if needed else MISSING, name, f"not installed{asked}", cure)
    if there is None:
        return Finding(OK, name, f"there, version not known{asked}")
    if not satisfies(there.version, wanted):
        return Finding(BROKEN, name, f"{there.version} is out of range{asked}", cure)
    if wrong := installed.conflicts(name):
        return Finding(BROKEN, name, f"{there.version} wants {', '.join(wrong)}", cure)
    try:
        result = trials.OF_PACKAGES.get(name, lambda: "")()
    except Exception as error:  # whatever a binary package may raise
        return Finding(BROKEN, name, f"{there.version} does not work: {told(error)}", cure)
    return Finding(OK, name, f"{there.version}{asked}{', ' if result else ''}{result}")

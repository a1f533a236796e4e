"""Checks of Python, gasp-fast itself and the packages that it requires."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.utils import canonicalize_name

from gasp_fast.files import one_line

from . import installed, trials
from .finding import BROKEN, MISSING, OK, Finding
from .installed import OURS, satisfies


def installation() -> Iterator[Finding]:
    ours = installed.find(OURS)
    if ours is None:
        found = "not installed, runs from its source; its required packages are not known"
        yield Finding(MISSING, OURS, found, installed.install_command())
        return
    source = installed.source_of(ours)
    where = f"{ours.version}, from {source}" if source else ours.version
    metadata = Path(str(ours.locate_file(""))) / f"gasp_fast-{ours.version}.dist-info" / "METADATA"
    project = source / "pyproject.toml" if source else None
    if project and project.is_file() and metadata.is_file() and project.stat().st_mtime > metadata.stat().st_mtime:
        where += ", but its pyproject.toml is newer: the ranges below may be out of date"
        yield Finding(MISSING, OURS, where, installed.install_command())
    else:
        yield Finding(OK, OURS, where)


def python() -> Iterator[Finding]:
    ours = installed.find(OURS)
    specifier = (ours.metadata["Requires-Python"] or "") if ours else ""
    fits = satisfies(platform.python_version(), specifier)
    found = f"{platform.python_version()}, {sys.executable}"
    yield Finding(OK if fits else BROKEN, "Python", found if fits else f"{found}; gasp-fast needs {specifier}")


def of_extra(extra: str) -> Iterator[Finding]:
    """A finding for each package that `gasp-fast[extra]` adds; of the empty extra, that gasp-fast always requires."""
    for requirement in installed.requirements_of_extra(extra):
        name = canonicalize_name(requirement.name)
        yield package(name, str(requirement.specifier), installed.install_command(extra), required=not extra)


def package(name: str, specifier: str, cure: str, required: bool = False) -> Finding:
    """Whether the package is installed, in range, with the versions that it requires itself, and works."""
    version, needs = installed.version_of(name), f" (needs {specifier})" if specifier else ""
    if not installed.has_module(name):
        if version:
            return Finding(BROKEN, name, f"{version} is recorded as installed, but its files are missing", cure)
        return Finding(BROKEN if required else MISSING, name, f"not installed{needs}", cure)
    if version is None:
        return Finding(OK, name, f"installed, version not known{needs}")
    if not satisfies(version, specifier):
        return Finding(BROKEN, name, f"{version} is out of range{needs}", cure)
    if wrong := installed.conflicts(name):
        return Finding(BROKEN, name, f"{version} needs {', '.join(wrong)}", cure)
    try:
        result = trials.OF_PACKAGES.get(name, lambda: "")()
    except Exception as error:  # a binary package may raise anything
        return Finding(BROKEN, name, f"{version} does not work: {one_line(error)}", cure)
    return Finding(OK, name, f"{version}{needs}{', ' if result else ''}{result}")

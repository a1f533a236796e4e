"""Installed packages by their metadata: versions, required ranges, and the command that installs.

The ranges of gasp-fast are read from its installed distribution. Packages are looked up, not imported: importing
DeepSpeed or transformers takes seconds and prints.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

OURS = "gasp-fast"
TORCH_INDEX = "https://download.pytorch.org/whl/"  # followed by a build: cpu, cu130 ...
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "openexr": "OpenEXR"}  # where a module is named otherwise


def requirements(name: str) -> list[Requirement]:
    """What an installed package requires, by its metadata; empty if it is not installed."""
    package = find(name)
    return [Requirement(line) for line in (package.requires or ())] if package else []


def requirements_of_extra(extra: str) -> list[Requirement]:
    """What `gasp-fast[extra]` adds to gasp-fast; of the empty extra, what gasp-fast always requires."""
    always = [one for one in requirements(OURS) if one.marker is None or one.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    added = [one for one in requirements(OURS) if one.marker and one.marker.evaluate({"extra": extra})]
    return [one for one in added if one not in always and one.name != OURS]


def range_of(name: str) -> str:
    """The versions of a package that gasp-fast requires, in any extra: "<6,>=5.17"; empty: any."""
    return next((str(one.specifier) for one in requirements(OURS) if canonicalize_name(one.name) == name), "")


def satisfies(version: str, specifier: SpecifierSet | str) -> bool:
    """Whether the version is in the range. A pre-release may be."""
    try:
        return SpecifierSet(str(specifier)).contains(version, prereleases=True)
    except InvalidVersion:
        return False


def conflicts(name: str) -> list[str]:
    """The requirements of the package that are not met. Those under a condition are not checked."""
    wrong = []
    for one in requirements(name):
        version = version_of(one.name)
        if one.marker is None and (version is None or not satisfies(version, one.specifier)):
            wrong.append(f"{one.name}{one.specifier}, but {version or 'none'} is installed")
    return wrong


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(MODULES.get(name, name.replace("-", "_"))) is not None
    except (ImportError, ValueError):
        return False


def version_of(name: str) -> str | None:
    package = find(name)
    return package.version if package else None


def find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


# ---- commands -------------------------------------------------------------------------------------------------------


def install_command(extra: str = "", *options: str) -> str:
    """The pip command that installs gasp-fast with an extra from where it came: source tree, archive or index."""
    suffix, ours = f"[{extra}]" if extra else "", find(OURS)
    source = source_of(ours)
    if source is not None:
        pins = source / "constraints.txt"
        words = ["-c", str(pins)] if pins.is_file() else []
        return pip_install(*options, *words, "-e", f"{source}{suffix}")
    archive = _direct_url(ours).get("url")
    return pip_install(*options, f"{OURS}{suffix} @ {archive}" if archive else f"{OURS}{suffix}")


def pip_install(*words: str) -> str:
    """`pip install ...` for the running Python. Without pip, as in environments of uv: by uv, or ensurepip first."""
    pip = shlex.join([sys.executable, "-m", "pip", "install", *words])
    if has_module("pip"):
        return pip
    if shutil.which("uv"):
        return shlex.join(["uv", "pip", "install", "--python", sys.executable, *words])
    return f"{shlex.quote(sys.executable)} -m ensurepip && {pip}"


def source_of(ours: Distribution | None) -> Path | None:
    """The source tree in use: of an editable installation, or of code that runs without being installed."""
    if ours is None:
        root = Path(__file__).parents[2]
        return root if (root / "pyproject.toml").is_file() else None
    origin = _direct_url(ours)
    editable = origin.get("dir_info", {}).get("editable", False)
    return Path(unquote(urlparse(origin["url"]).path)) if editable else None


def _direct_url(ours: Distribution | None) -> dict:
    return json.loads((ours.read_text("direct_url.json") if ours else None) or "{}")

"""What is installed, by its metadata: versions, the ranges that a package asks for, and the command that installs.

The ranges of gasp-fast are read from its own installed distribution, never copied. Packages are looked up, not
imported: importing DeepSpeed or transformers takes seconds and talks.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

from .versions import satisfies

OURS = "gasp-fast"
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "openexr": "OpenEXR"}  # where a module is named otherwise
_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)\s*(\[(?P<extras>[^]]*)\])?\s*\(?(?P<range>[^;()]*)\)?\s*(;\s*(?P<marker>.*))?"
)


@dataclass(frozen=True)
class Requirement:
    name: str
    range: str  # ">=5.17,<6"; empty: any
    marker: str  # 'extra == "train"'; empty: always

    @property
    def extra(self) -> str:
        """The extra that asks for it; empty if it is always asked for."""
        found = re.search(r"""extra\s*==\s*["']([^"']+)["']""", self.marker)
        return found[1] if found else ""


def requirements(name: str) -> list[Requirement]:
    there = find(name)
    matched = [_REQUIREMENT.match(line) for line in (there.requires or ())] if there else []
    return [
        Requirement(canonical(m["name"]), m["range"].replace(" ", ""), (m["marker"] or "").strip())
        for m in matched
        if m is not None
    ]


def range_of(name: str) -> str:
    """What gasp-fast asks of a package, in whichever extra."""
    return next((r.range for r in requirements(OURS) if r.name == name), "")


def conflicts(name: str) -> list[str]:
    """What the package itself asks for and does not get. Conditions other than none at all are not judged."""
    wrong = []
    for requirement in requirements(name):
        there = find(requirement.name)
        if requirement.marker or (there and satisfies(there.version, requirement.range)):
            continue
        wrong.append(f"{requirement.name}{requirement.range} and finds {there.version if there else 'none'}")
    return wrong


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(MODULES.get(name, name.replace("-", "_"))) is not None
    except (ImportError, ValueError):
        return False


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def version_of(name: str) -> str | None:
    there = find(name)
    return there.version if there else None


def find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


# ---- commands -------------------------------------------------------------------------------------------------------


def install_command(extra: str = "", *options: str) -> str:
    """Installs gasp-fast again, with an extra, the way it was installed: from its source, an archive or an index."""
    suffix, ours = f"[{extra}]" if extra else "", find(OURS)
    source = source_of(ours)
    if source is not None:
        pins = source / "constraints.txt"
        words = ["-c", str(pins)] if pins.is_file() else []
        return pip_install(*options, *words, "-e", f"{source}{suffix}")
    archive = _direct_url(ours).get("url")
    return pip_install(*options, f"{OURS}{suffix} @ {archive}" if archive else f"{OURS}{suffix}")


def pip_install(*words: str) -> str:
    """`pip install ...` for this very Python. Environments made by uv have no pip: then with uv, or pip comes first."""
    pip = shlex.join([sys.executable, "-m", "pip", "install", *words])
    if has_module("pip"):
        return pip
    if shutil.which("uv"):
        return shlex.join(["uv", "pip", "install", "--python", sys.executable, *words])
    return f"{shlex.quote(sys.executable)} -m ensurepip && {pip}"


def source_of(ours: Distribution | None) -> Path | None:
    """The source tree that is used as it stands: that of an editable installation, or of none at all."""
    if ours is None:
        root = Path(__file__).parents[2]
        return root if (root / "pyproject.toml").is_file() else None
    origin = _direct_url(ours)
    editable = origin.get("dir_info", {}).get("editable", False)
    return Path(unquote(urlparse(origin["url"]).path)) if editable else None


def _direct_url(ours: Distribution | None) -> dict:
    return json.loads((ours.read_text("direct_url.json") if ours else None) or "{}")

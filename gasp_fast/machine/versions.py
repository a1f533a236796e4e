"""Whether a version lies in a range, by the rules of PEP 440 as far as packages here use them.

The `packaging` library does this in full, but need not be installed where only torch is. Known: release numbers, alphas
to release candidates and development versions (which come before their release), `.post` and `+local` (ignored).
"""

from __future__ import annotations

import re

_CLAUSE = re.compile(r"\s*(===|==|!=|<=|>=|~=|<|>)\s*([^\s,]+)\s*")
_VERSION = re.compile(r"v?(?:\d+!)?(\d+(?:\.\d+)*)[._-]?(.*)", re.IGNORECASE)


def satisfies(version: str, wanted: str) -> bool:
    """Whether `version` fulfils every clause of `wanted`: `>=5.17,<6`. A pre-release may."""
    return all(_fulfils(version, *_split(clause)) for clause in wanted.split(",") if clause.strip())


def _split(clause: str) -> tuple[str, str]:
    matched = _CLAUSE.fullmatch(clause)
    if matched is None:
        raise ValueError(f"{clause!r} is no range of versions")
    return matched[1], matched[2]


def _fulfils(version: str, operator: str, limit: str) -> bool:
    if operator in ("==", "!=") and limit.endswith(".*"):
        return _begins_with(version, _release(limit[:-2])) == (operator == "==")
    if operator == "~=":
        return _key(version) >= _key(limit) and _begins_with(version, _release(limit)[:-1])
    ours, theirs = _key(version), _key(limit)
    if operator == "<":  # a pre-release of 6 is not below 6
        return ours < theirs and (theirs[1] == 0 or ours[0] != theirs[0])
    comparisons = {"==": ours == theirs, "===": ours == theirs, "!=": ours != theirs, "<=": ours <= theirs}
    return {**comparisons, ">=": ours >= theirs, ">": ours > theirs}[operator]


def _begins_with(version: str, release: tuple[int, ...]) -> bool:
    ours = _release(version) + (0,) * len(release)
    return ours[: len(release)] == release


def _key(version: str) -> tuple[tuple[int, ...], int, str]:
    """Orders versions: the release without trailing zeros, then pre-releases before it."""
    release = _release(version)
    while release and release[-1] == 0:
        release = release[:-1]
    rest = version.lower().split("+")[0]
    suffix = (_VERSION.match(rest) or [""] * 3)[2]
    early = suffix.startswith(("a", "b", "c", "rc", "dev", "pre"))
    return release, 0 if early else 1, suffix if early else ""


def _release(version: str) -> tuple[int, ...]:
    matched = _VERSION.match(version)
    return tuple(int(number) for number in matched[1].split(".")) if matched else ()

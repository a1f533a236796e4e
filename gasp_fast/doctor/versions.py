"""Whether a version lies in a range, by the rules of PEP 440 as far as packages here use them.

The `packaging` library does this in full, but need not be installed where only torch is. Known: release numbers, what
comes before a release (`.dev1`, `a1`, `b1`, `rc1`), what comes after (`.post1`), and `+local`, which is ignored.
"""

from __future__ import annotations

import re

EARLY, RELEASE, POST = 0, 1, 2
BEFORE = (("dev",), ("a",), ("b",), ("c", "rc", "pre"))  # a release, in this order
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
    same_release = ours[0] == theirs[0]
    if operator == "<":  # a pre-release of 6 is not below 6
        return ours < theirs and not (same_release and theirs[1] != EARLY)
    if operator == ">":  # nor a post-release of 6 above it
        return ours > theirs and not (same_release and theirs[1] == RELEASE)
    equal = {"==": ours == theirs, "===": ours == theirs, "!=": ours != theirs}
    return {**equal, "<=": ours <= theirs, ">=": ours >= theirs}[operator]


def _begins_with(version: str, release: tuple[int, ...]) -> bool:
    ours = _release(version) + (0,) * len(release)
    return ours[: len(release)] == release


def _key(version: str) -> tuple[tuple[int, ...], int, int, tuple[int, ...]]:
    """Orders versions: the release without trailing zeros, before or after it, and how far."""
    release = _release(version)
    while release and release[-1] == 0:
        release = release[:-1]
    suffix = (_VERSION.match(version.lower().split("+")[0]) or ("", "", ""))[2]
    numbers = tuple(map(int, re.findall(r"\d+", suffix)))
    if suffix.startswith("post"):
        return release, POST, 0, numbers
    early = next((rank for rank, names in enumerate(BEFORE) if suffix.startswith(names)), None)
    return (release, RELEASE, 0, ()) if early is None else (release, EARLY, early, numbers)


def _release(version: str) -> tuple[int, ...]:
    matched = _VERSION.match(version)
    return tuple(int(number) for number in matched[1].split(".")) if matched else ()

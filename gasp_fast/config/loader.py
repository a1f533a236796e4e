"""Configurations: YAML files and `key.path=value` overrides become nested keyword-only dataclasses, and back.

Knows dataclasses and YAML; must not know what any configuration is about. The dataclasses live beside what they
configure; their defaults are the defaults, the comment behind a field is its documentation (`reference` prints both).

A file may build on another one, named relative to itself: `base: qwen.yaml`. Mappings are merged key by key, anything
else is replaced; overrides come last. Every value remembers where it was written, so that an error can say so:

    configs/qwen.yaml: optimizer.lr = 'fast' must be a number
    command line: optimizer.learning_rate = 0.1 is no key of TrainConfig; the nearest is optimizer.lr

Values are taken as what they are: no text becomes a number and no number becomes true or false, with two exceptions.
YAML reads `1e-4` as text, so a float may be such text; and an override of a text field is text whatever it looks like.
"""

from __future__ import annotations

import difflib
import os
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from .fields import dataclasses_in, default_of, field_comments, is_required, is_union, type_name

ConfigT = TypeVar("ConfigT")

BASE = "base"  # the one reserved key: the file that this one builds on
COMMAND_LINE = "command line"
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def load_config(cls: type[ConfigT], path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> ConfigT:
    """The `cls` that the YAML file at `path` describes, after `overrides` of the form `key.path=value`."""
    if BASE in {field.name for field in fields(cls)}:  # type: ignore[arg-type]
        raise TypeError(f"{cls.__name__} has a field {BASE!r}, the key by which a file names the file it builds on")
    tree = _read(Path(path), ())
    for override in overrides:
        key, equals, text = override.partition("=")
        keys = key.strip().split(".")
        if not equals or not all(keys):
            raise ValueError(f"{COMMAND_LINE}: {override!r} is no override; write key.path=value")
        tree = _merged(tree, _override(keys, text))
    return _build(cls, tree, "", cls)


def to_tree(config: Any) -> Any:
    """The same configuration in dicts, lists and scalars, as YAML can hold it."""
    if is_dataclass(config):
        return {field.name: to_tree(getattr(config, field.name)) for field in fields(config) if field.init}
    if isinstance(config, dict):
        return {key: to_tree(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_tree(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def to_yaml(config: Any) -> str:
    """YAML text from which `load_config` makes an equal configuration."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, width=120)


def reference(cls: type) -> str:
    """Every key of `cls` with its default, its type and the comment of its field: YAML to start a file from."""
    return "\n".join(_reference(cls, "")) + "\n"


# ---- the tree: what the files and the command line say, each value with its origin ----------------------------------


class _Branch(dict[Any, Any]):
    """A mapping of a file: keys to branches and leaves."""

    def __init__(self, origin: str) -> None:
        super().__init__()
        self.origin = origin


@dataclass(frozen=True)
class _Leaf:
    value: Any
    origin: str
    text: str | None = None  # as it was typed on the command line


class _Loader(yaml.SafeLoader):
    """`yaml.safe_load`, except that a key given twice is an error instead of the first one being ignored."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for at, (key, _) in enumerate(node.value):
            if key.value in names[:at]:
                raise yaml.MarkedYAMLError(problem=f"key {key.value} is given twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise ValueError(f"{origin}: {where}{getattr(error, 'problem', None) or 'is not YAML'}") from None


def _read(path: Path, above: tuple[Path, ...]) -> _Branch:
    """The tree of one file over that of its base; `above` are the files that led here."""
    if path.resolve() in above:
        raise ValueError(f"{above[-1]}: {BASE} = {str(path)!r} leads back to a file that builds on this one")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text") from None
    said = _parse(text, str(path))
    said = {} if said is None else said
    if not isinstance(said, dict):
        raise ValueError(f"{path}: holds {said!r}; a configuration is a mapping of keys to values")
    if BASE not in said:
        return _planted(said, str(path))
    base = said.pop(BASE)
    if not isinstance(base, str):
        raise ValueError(f"{path}: {BASE} = {base!r} must be the name of a file, relative to this one")
    if not (path.parent / base).is_file():
        raise FileNotFoundError(f"{path}: {BASE} = {base!r} does not exist beside it")
    return _merged(_read(path.parent / base, (*above, path.resolve())), _planted(said, str(path)))


def _planted(said: Any, origin: str) -> Any:
    if not isinstance(said, dict):
        return _Leaf(said, origin)
    branch = _Branch(origin)
    for key, value in said.items():
        branch[key] = _planted(value, origin)
    return branch


def _override(keys: Sequence[str], text: str) -> _Branch:
    """`a.b=text` as a tree."""
    value = _planted(_parse(text, COMMAND_LINE), COMMAND_LINE)
    node: Any = _Leaf(value.value, COMMAND_LINE, text) if isinstance(value, _Leaf) else value
    for key in reversed(keys):
        branch = _Branch(COMMAND_LINE)
        branch[key] = node
        node = branch
    return node


def _merged(below: _Branch, above: _Branch) -> _Branch:
    """`above` over `below`: mappings key by key, anything else replaced."""
    result = _Branch(above.origin)
    result.update(below)
    for key, node in above.items():
        old = result.get(key)
        result[key] = _merged(old, node) if isinstance(old, _Branch) and isinstance(node, _Branch) else node
    return result


# ---- from tree to dataclass -----------------------------------------------------------------------------------------


def _build(cls: Any, tree: _Branch, path: str, root: type) -> Any:
    """An instance of the dataclass `cls` from the mapping at `path`."""
    hints = get_type_hints(cls)
    known = {field.name: field for field in fields(cls) if field.init}
    for key, node in tree.items():
        if key not in known:
            raise _unknown(node, _join(path, key), root)
    values = {key: _convert(hints[key], node, _join(path, key), root) for key, node in tree.items()}
    for name, field in known.items():
        if name not in values and is_required(field):
            raise ValueError(f"{tree.origin}: {_join(path, name)} is missing; it has no default")
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:  # the dataclass's own checks
        prefix = "" if not path or str(error).startswith(path) else f"{path}: "
        raise ValueError(f"{tree.origin}: {prefix}{error}") from None


def _convert(kind: Any, node: Any, path: str, root: type) -> Any:
    """The value of `node` as type `kind`; a ValueError says what it must be instead."""
    if is_union(kind):
        return _convert_union(get_args(kind), node, path, root)
    if is_dataclass(kind):
        if not isinstance(node, _Branch):
            raise _wrong(node, path, f"a mapping with keys of {kind.__name__}")  # type: ignore[union-attr]
        return _build(kind, node, path, root)
    container, arguments = get_origin(kind) or kind, get_args(kind)
    if container is dict:
        if not isinstance(node, _Branch) or not all(isinstance(key, str) for key in node):
            raise _wrong(node, path, "a mapping with text as keys")
        inner = arguments[1] if arguments else Any
        return {key: _convert(inner, value, _join(path, key), root) for key, value in node.items()}
    value = _plain(node)
    if container in (list, tuple):
        return _convert_items(container, arguments, node, path, root)
    if container is Literal:
        for said in (value, _typed(node)):
            if any(type(said) is type(choice) and said == choice for choice in arguments):
                return said
        quote = "; YAML reads a bare on, off, yes or no as true or false: quote it" if isinstance(value, bool) else ""
        raise _wrong(node, path, f"one of {', '.join(map(repr, arguments))}{quote}")
    if kind is Any:
        return value
    return _convert_scalar(kind, node, value, path)


def _convert_scalar(kind: Any, node: Any, value: Any, path: str) -> Any:
    if kind in (str, Path) and not isinstance(value, str) and value is not None and _typed(node) is not None:
        value = _typed(node)  # an override is text where text is wanted: heads.layers=7
    if kind is float:
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            value = float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        raise _wrong(node, path, "a number")
    if kind is int and isinstance(value, bool):
        raise _wrong(node, path, "a whole number")
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind in _SCALARS:
        if isinstance(value, kind):
            return value
        raise _wrong(node, path, _SCALARS[kind])
    raise TypeError(f"{path} is declared as {kind}, which a configuration cannot hold")


_SCALARS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    str: "text (quote it)",
    Path: "a path",
    types.NoneType: "null",
}


def _convert_items(container: Any, kinds: tuple[Any, ...], node: Any, path: str, root: type) -> Any:
    """list[X], tuple[X, ...] or tuple[X, Y]."""
    if isinstance(node, _Branch) or not isinstance(node.value, list):
        raise _wrong(node, path, "a list")
    items = node.value
    if container is list or (len(kinds) == 2 and kinds[1] is Ellipsis) or not kinds:
        kinds = (kinds[0] if kinds else Any,) * len(items)
    if len(kinds) != len(items):
        raise _wrong(node, path, f"a list of {len(kinds)} values")
    return container(
        _convert(kind, _planted(item, node.origin), f"{path}[{at}]", root)
        for at, (kind, item) in enumerate(zip(kinds, items, strict=True))
    )


def _convert_union(kinds: tuple[Any, ...], node: Any, path: str, root: type) -> Any:
    """The first member that takes the value unchanged, else the first that takes it at all."""
    value = _plain(node)
    if value is None and types.NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not types.NoneType]
    if isinstance(node, _Branch):
        others = [kind for kind in others if is_dataclass(kind) or (get_origin(kind) or kind) is dict] or others
    if len(others) == 1:
        return _convert(others[0], node, path, root)
    taken = []
    for kind in others:
        try:
            taken.append(_convert(kind, node, path, root))
        except ValueError:
            continue
    if not taken:
        raise _wrong(node, path, " or ".join(map(type_name, kinds)))
    return next((result for result in taken if type(result) is type(value) and result == value), taken[0])


def _plain(node: Any) -> Any:
    if isinstance(node, _Branch):
        return {key: _plain(value) for key, value in node.items()}
    return node.value


def _typed(node: Any) -> str | None:
    """What was typed on the command line for this value."""
    return node.text.strip() if isinstance(node, _Leaf) and node.text is not None else None


# ---- errors ---------------------------------------------------------------------------------------------------------


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _wrong(node: Any, path: str, wanted: str) -> ValueError:
    return ValueError(f"{node.origin}: {path} = {_shown(node)} must be {wanted}")


def _unknown(node: Any, path: str, root: type) -> ValueError:
    nearest = _nearest(path, list(_key_paths(root, "")))
    return ValueError(f"{node.origin}: {path} = {_shown(node)} is no key of {root.__name__}; the nearest is {nearest}")


def _shown(node: Any) -> str:
    text = repr(_plain(node))
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest(path: str, valid: Sequence[str]) -> str:
    """The valid key most like `path`: by its last word first of all, since keys get lost between groups."""

    def likeness(candidate: str) -> float:
        (group, _, name), (its_group, _, its_name) = path.rpartition("."), candidate.rpartition(".")
        same_name = difflib.SequenceMatcher(None, name, its_name).ratio()
        return 3 * same_name + difflib.SequenceMatcher(None, group, its_group).ratio()

    return max(valid, key=likeness)


def _key_paths(cls: Any, path: str) -> Iterator[str]:
    """Every key of `cls` and of the dataclasses in it."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        if field.init:
            here = _join(path, field.name)
            yield here
            for inner in dataclasses_in(hints[field.name]):
                yield from _key_paths(inner, here)


# ---- the documented reference ---------------------------------------------------------------------------------------


def _reference(cls: Any, indent: str) -> Iterator[str]:
    hints, comments = get_type_hints(cls), field_comments(cls)
    for field in (field for field in fields(cls) if field.init):
        nested = dataclasses_in(hints[field.name])
        said = f": {comments[field.name]}" if field.name in comments else ""
        if nested and not (is_union(hints[field.name]) and default_of(field) is None):
            yield f"{indent}{field.name}:  # {nested[0].__name__}{said}"
            yield from _reference(nested[0], indent + "  ")
            continue
        default = "???" if is_required(field) else yaml.safe_dump(to_tree(default_of(field)), default_flow_style=True)
        default = " ".join(default.removesuffix("...\n").split())
        yield f"{indent}{field.name}: {default}  # {type_name(hints[field.name])}{said}"
        if nested:  # off unless given: show what it would hold
            yield from (f"{indent}# {line}" for line in _reference(nested[0], "  "))

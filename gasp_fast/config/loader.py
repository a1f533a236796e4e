"""Reads a configuration from YAML files and `key.path=value` overrides, and writes it back.

A configuration is a dataclass of dataclasses; each is defined beside the code that it configures. OmegaConf parses the
YAML, checks every value against the declared type and fills in the defaults. This module adds three things:

- A file may build on another one, named relative to itself: `base: qwen.yaml`. Mappings are merged key by key, any
  other value is replaced. Overrides come last.
- Every error names the file (or the command line), the key and the value:

      configs/qwen.yaml: train.learning_rate = 'fast' must be a number
      command line: learning_rate = 0.1 is no key of TrainConfig; the nearest is train.learning_rate

- Values are taken as written. Text does not become a number, a number does not become true or false, and OmegaConf's
  `${...}` and `???` are refused: a recipe reads no environment variable and calls no function.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

ConfigT = TypeVar("ConfigT")
Keys = tuple[str, ...]  # ("train", "clip") is the path train.clip

BASE = "base"  # the reserved key that names the file to build on
COMMAND_LINE = "command line"
LARGEST_WHOLE = (1 << 63) - 1
_PLACEHOLDER = re.compile(r"\$\{|'\?\?\?'")  # in the repr of a value


@dataclass(frozen=True)
class Setting:
    """A value, or a mapping of values, as it was written in a file or on the command line."""

    value: Any
    origin: str
    text: str | None = None  # what was typed on the command line for this one value


def load_config(cls: type[ConfigT], path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> ConfigT:
    """The `cls` that the YAML file at `path` describes, after `overrides` of the form `key.path=value`."""
    if BASE in {field.name for field in fields(cls)}:  # type: ignore[arg-type]
        raise TypeError(f"{cls.__name__} has a field {BASE!r}, the key that names the file to build on; rename it")
    declared = dict(_declared(cls))
    settings: dict[Keys, Setting] = {}
    for source in (*_read(Path(path)), *map(_override, overrides)):
        for keys, value in _leaves(source.value, declared):
            settings = _replaced(settings, keys, replace(source, value=value))

    kind: Any = cls
    of_files = {keys: s for keys, s in settings.items() if s.origin != COMMAND_LINE and keys in declared}
    together = _set_together(kind, of_files)
    config: Any = copy.deepcopy(_structured(kind)) if together is None else together
    for keys, setting in settings.items():
        if keys not in declared:
            nearest = _nearest(_dotted(keys), list(map(_dotted, declared)))
            shown = _shown(keys, setting)
            if setting.origin not in (
                str(path),
                COMMAND_LINE,
            ):  # a base may be any file: print none of its values
                shown = f"{setting.origin}: {_dotted(keys)}"
            raise ValueError(f"{shown} is no key of {cls.__name__}; the nearest is {nearest}")
        if together is None or keys not in of_files:
            config = _set(config, keys, setting, declared[keys])
    return _build(config, (), settings, str(path))


def objective_of(path: Path) -> str | None:
    """The value of the key `objective` in a file or the files that it builds on: which kind of configuration it is."""
    named = [setting.value["objective"] for setting in _read(path) if "objective" in setting.value]
    return named[-1] if named else None


def to_yaml(config: Any) -> str:
    """YAML text from which `load_config` makes an equal configuration."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def keys_of(cls: Any) -> list[str]:
    """Every key of a configuration, and every group of keys, as in train.learning_rate and train."""
    return [_dotted(keys) for keys, _ in _declared(cls)]


# ---- files and overrides --------------------------------------------------------------------------------------------


def _read(path: Path, above: tuple[Path, ...] = ()) -> Iterator[Setting]:
    """The mapping of the file's base, then its own; `above` are the files that led here."""
    if path.resolve() in above:
        raise ValueError(f"{above[-1]}: {BASE} = {str(path)!r} leads back to a file that builds on this one")
    try:
        tree = _parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}; a configuration is a mapping of keys to values")
    if BASE in tree:
        base = tree.pop(BASE)
        if not isinstance(base, str):
            raise ValueError(f"{path}: {BASE} = {base!r} must be the name of a file, relative to this one")
        if Path(base).suffix not in (".yaml", ".yml"):
            raise ValueError(f"{path}: {BASE} = {base!r} must be a .yaml or .yml file; any other is not read")
        if not (path.parent / base).is_file():
            raise FileNotFoundError(f"{path}: {BASE} = {base!r} does not exist; write it relative to this file")
        yield from _read(path.parent / base, (*above, path.resolve()))
    yield Setting(tree, str(path))


def _override(override: str) -> Setting:
    key, equals, text = override.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        raise ValueError(f"{COMMAND_LINE}: {override!r} is no override; write key.path=value")
    value = _parse(text, COMMAND_LINE)
    typed = None if value is None or isinstance(value, dict) else text.strip()
    return Setting(_nested(keys, value), COMMAND_LINE, typed)


def _parse(text: str, origin: str) -> Any:
    """Dicts, lists and scalars of safe YAML. A key given twice is an error; `1e-4` is a number."""
    try:
        parsed = OmegaConf.from_dotlist([f"yaml={text}"])  # what follows "=" is read as YAML
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise ValueError(f"{origin}: {line}{getattr(error, 'problem', None) or 'is not YAML'}") from None
    except (OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{origin}: {str(error).splitlines()[0]}") from None
    return OmegaConf.to_container(parsed, resolve=False)["yaml"]  # type: ignore[call-overload,index]


# ---- settings by key ------------------------------------------------------------------------------------------------


def _declared(cls: Any, above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every key of `cls` and of the dataclasses in it, with its declared type."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        keys = (*above, field.name)
        yield keys, hints[field.name]
        for member in filter(is_dataclass, _members(hints[field.name])):
            yield from _declared(member, keys)


def _leaves(tree: Any, declared: dict[Keys, Any], keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """(keys, value) of each value. A mapping is divided where a dataclass is declared, and is a value elsewhere."""
    divided = not keys or any(map(is_dataclass, _members(declared.get(keys))))
    if divided and isinstance(tree, dict) and (tree or not keys):
        for key, value in tree.items():
            yield from _leaves(value, declared, (*keys, key))
    else:
        yield keys, tree


def _nested(keys: Keys, value: Any) -> Any:
    for key in reversed(keys):
        value = {key: value}
    return value


def _replaced(settings: dict[Keys, Setting], keys: Keys, setting: Setting) -> dict[Keys, Setting]:
    """`settings` with a later one, which takes the place of what it contradicts."""
    if setting.value == {} and any(other[: len(keys)] == keys for other in settings):
        return settings  # an empty mapping changes no key
    kept = {k: s for k, s in settings.items() if k[: len(keys)] != keys and keys[: len(k)] != k}
    return {**kept, keys: setting}


# ---- from settings to the dataclass ---------------------------------------------------------------------------------


def _set(config: Any, keys: Keys, setting: Setting, kind: Any) -> Any:
    """`config` with one value set. An override of a text is the text as typed: `heads.layers=7`, `run.out=010`."""
    if _PLACEHOLDER.search(repr(setting.value)):
        raise ValueError(f"{_shown(keys, setting)} is a placeholder, which is not filled in; write the value itself")
    for value in [setting.value] if setting.text is None else [setting.value, setting.text]:
        try:
            # Not `merge`, which copies everything. What a failed try leaves at `keys` is replaced or not used.
            merged = OmegaConf.unsafe_merge(config, _nested(keys, value))
        except (OmegaConfBaseException, TypeError, OverflowError):  # a list for a mapping; 1 with 400 zeros
            continue
        read = OmegaConf.select(merged, _dotted(keys))
        if _same(value, read):
            if _beyond_64_bits(read):
                raise ValueError(f"{_shown(keys, setting)} does not fit 64 bits; give a whole number below 2**63")
            return merged
    cure = "; quote it: YAML reads on, off, yes and no as true or false" if isinstance(setting.value, bool) else ""
    raise ValueError(f"{_shown(keys, setting)} must be {_type_name(kind)}{cure if kind is not bool else ''}")


@cache
def _structured(cls: Any) -> Any:
    """Takes as long as all else together. To be copied."""
    return OmegaConf.structured(cls)


def _set_together(cls: Any, settings: dict[Keys, Setting]) -> Any:
    """A `cls` with all values of files set in one merge, which is faster; None if one of them is not as it should be.

    `_set` finds out which one, and why.
    """
    tree: dict[str, Any] = {}
    for keys, setting in settings.items():
        group = tree
        for key in keys[:-1]:
            group = group.setdefault(key, {})
        group[keys[-1]] = setting.value
    if _PLACEHOLDER.search(repr(tree)):
        return None
    try:
        merged = OmegaConf.unsafe_merge(copy.deepcopy(_structured(cls)), tree)
    except (OmegaConfBaseException, TypeError, OverflowError):
        return None
    read = [(setting.value, OmegaConf.select(merged, _dotted(keys))) for keys, setting in settings.items()]
    sound = all(_same(written, found) and not _beyond_64_bits(found) for written, found in read)
    return merged if sound else None


def _same(written: Any, read: Any) -> bool:
    """Whether OmegaConf has kept the value; it would also read the text "5" as 5 and the number 1 as true."""
    if isinstance(written, dict):
        return isinstance(read, DictConfig)
    if isinstance(written, list):
        return len(written) == len(read) and all(map(_same, written, read))
    return bool(written == read) and isinstance(written, bool) == isinstance(read, bool)


def _beyond_64_bits(read: Any) -> bool:
    """Whether a whole number, or one in a list, is too large for tensors and arrays, which take it much later."""
    if OmegaConf.is_config(read):
        return any(map(_beyond_64_bits, read))
    return isinstance(read, int) and not -LARGEST_WHOLE <= read <= LARGEST_WHOLE


def _build(config: DictConfig, keys: Keys, settings: dict[Keys, Setting], path: str) -> Any:
    """The dataclass of the mapping at `keys`, with the dataclasses in it. Runs their own checks."""
    origin = next((s.origin for k, s in reversed(settings.items()) if k[: len(keys)] == keys), path)
    values = {}
    for name in map(str, config):
        if OmegaConf.is_missing(config, name):
            raise ValueError(f"{origin}: {_dotted((*keys, name))} is missing; it has no default")
        value = config[name]
        if isinstance(value, DictConfig):
            values[name] = _build(value, (*keys, name), settings, path)
        else:
            values[name] = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
    try:
        return OmegaConf.get_type(config)(**values)  # type: ignore[misc]
    except (ValueError, TypeError) as error:
        prefix = "" if str(error).startswith(_dotted(keys)) else f"{_dotted(keys)}: "
        raise ValueError(f"{origin}: {prefix}{error}") from None


# ---- words for errors -----------------------------------------------------------------------------------------------

_NAMES: dict[Any, str] = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "text (quote it)",
    types.NoneType: "null",
    Ellipsis: "...",
}


def _type_name(kind: Any) -> str:
    if len(_members(kind)) > 1:
        return " or ".join(map(_type_name, _members(kind)))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"a list: {', '.join(map(_type_name, get_args(kind)))}"
    return f"a mapping with keys of {kind.__name__}" if is_dataclass(kind) else _NAMES.get(kind, str(kind))  # type: ignore[union-attr]


def _members(kind: Any) -> tuple[Any, ...]:
    """The members of a union; any other type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _shown(keys: Keys, setting: Setting) -> str:
    value = repr(setting.value)
    return f"{setting.origin}: {_dotted(keys)} = {value if len(value) <= 80 else value[:77] + '...'}"


def _dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))


def _nearest(key: str, valid: list[str]) -> str:
    """The valid key most like `key`. The last word counts most: a key is often written into the wrong group."""

    def likeness(candidate: str) -> float:
        (group, _, name), (its_group, _, its_name) = key.rpartition("."), candidate.rpartition(".")
        same_name = difflib.SequenceMatcher(None, name, its_name).ratio()
        if len(name) > 1 and name == "".join(word[0] for word in its_name.split("_") if word):
            same_name = 1.0  # initials, such as lr
        return 3 * same_name + difflib.SequenceMatcher(None, group, its_group).ratio()

    return max(valid, key=likeness)

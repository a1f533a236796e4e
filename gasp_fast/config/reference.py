"""Every key of a configuration with its type, its default and the comment beside its field.

docs/configuration.md is made from this, and `gasp-fast recipes --keys` prints it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, dropwhile, takewhile
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml


@dataclass(frozen=True)
class Key:
    """One key. A key without a default must be given."""

    path: str
    kind: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Group:
    """The keys of one dataclass, and the first sentence of its docstring. The path of the outermost is empty."""

    path: str
    meaning: str
    keys: list[Key]


def groups_of(cls: Any, path: str = "") -> Iterator[Group]:
    """The groups of keys in `cls`, outer ones first."""
    comments, kinds = field_comments(cls), declared_kinds(cls)
    hints = get_type_hints(cls)
    keys, inner = [], []
    for field in dataclasses.fields(cls):
        below = f"{path}.{field.name}" if path else field.name
        parts = (hints[field.name], *get_args(hints[field.name]))
        nested = next(filter(dataclasses.is_dataclass, parts), None)
        if nested is not None:
            inner.append((nested, below))
        else:
            keys.append(Key(below, kinds[field.name], _default(field), comments[field.name]))
    sentence = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    if keys:
        yield Group(path, sentence, keys)
    for nested, below in inner:
        yield from groups_of(nested, below)


def field_comments(cls: Any) -> dict[str, str]:
    """The comment of each field: at the end of its line, and continued in the lines below it.

    A comment that begins with a capital letter, in lines of its own, is that of the fields below it that have none.
    """
    owners: list[Any] = [owner for owner in cls.__mro__ if dataclasses.is_dataclass(owner)]
    return {name: text for owner in reversed(owners) for name, text in _own_field_comments(owner).items()}


def _own_field_comments(cls: Any) -> dict[str, str]:
    """Those of the fields that `cls` itself declares."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    alone = {line for line, text in enumerate(source.splitlines(), start=1) if text.lstrip().startswith("#")}
    [definition] = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)

    def continues(line: int) -> bool:
        return not comments[line][0].isupper()

    found, above = {}, ""
    for statement in definition.body:
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        first, last = statement.lineno, statement.end_lineno or statement.lineno
        if heading := list(dropwhile(continues, _lines_alone(first, -1, alone))):
            above = " ".join(comments[line] for line in heading)
        own = [line for line in range(first, last + 1) if line in comments]
        if own:
            own += takewhile(continues, _lines_alone(last, 1, alone))
        found[statement.target.id] = " ".join(comments[line] for line in own) or above
        above = "" if own else above
    return found


def _lines_alone(line: int, step: int, alone: set[int]) -> list[int]:
    """The lines before or after `line` that hold a comment alone, up to the first other one, from top to bottom."""
    return sorted(takewhile(alone.__contains__, count(line + step, step)))


def declared_kinds(cls: Any) -> dict[str, str]:
    """The type of each field in words of a recipe: `"bf16" or "fp32"`, `whole number or null`."""
    hints = get_type_hints(cls)
    return {field.name: _words(hints[field.name]) for field in dataclasses.fields(cls)}


_NAMES = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text", "NoneType": "null"}


def _words(kind: Any) -> str:
    members = get_args(kind)
    if get_origin(kind) is tuple:
        return f"list of {_words(members[0])}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_words, members))
    if members:  # Literal
        return ", ".join(map(str, members))
    return _NAMES.get(getattr(kind, "__name__", ""), str(kind))


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "must be given"
    value = list(value) if isinstance(value, tuple) else value
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("...\n").strip()


def as_markdown(kinds: Mapping[str, Iterator[Group]]) -> str:
    """The page docs/configuration.md: a section with a table for each group, of each kind of recipe by its name.

    The first kind has no name.
    """
    lines = [
        "# Configuration: every key of a recipe",
        "",
        "Made from the code by `gasp-fast recipes --keys markdown`. A key is set in a recipe, or on the command line",
        "as `key.path=value`.",
        "",
    ]
    for kind, group in _with_kind(kinds):
        heading = f"`{group.path}`" if group.path else "The run"
        lines += [f"## {kind}{heading}", "", group.meaning, ""]
        lines += ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
        for key in group.keys:
            cells = (f"`{key.path}`", key.kind, f"`{key.default}`", key.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _with_kind(kinds: Mapping[str, Iterator[Group]]) -> Iterator[tuple[str, Group]]:
    return ((f"{kind}: " if kind else "", group) for kind, groups in kinds.items() for group in groups)


def as_text(kinds: Mapping[str, Iterator[Group]]) -> str:
    """The keys for a terminal of 80 columns."""
    lines = []
    for kind, group in _with_kind(kinds):
        lines += [*textwrap.wrap(f"# {kind}{group.meaning}", 80, subsequent_indent="# "), ""]
        for key in group.keys:
            lines.append(f"{key.path}: {key.default}")
            for text in (key.kind, key.meaning):
                lines += textwrap.wrap(text, 80, initial_indent="    ", subsequent_indent="    ")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"

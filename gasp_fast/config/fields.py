"""What the fields of a dataclass say about themselves: type, default, and the comment in the source behind them.

Knows dataclasses and their source text; must not know files or values. `config.py` reads configurations with it.
"""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
import types
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin


def is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def dataclasses_in(kind: Any) -> list[Any]:
    if is_dataclass(kind):
        return [kind]
    return [inner for member in get_args(kind) if is_union(kind) for inner in dataclasses_in(member)]


def default_of(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return None if field.default_factory is MISSING else field.default_factory()


def type_name(kind: Any) -> str:
    if is_union(kind):
        return " or ".join(map(type_name, get_args(kind)))
    if get_origin(kind) is Literal:
        return " | ".join(map(repr, get_args(kind)))
    if kind is types.NoneType:
        return "null"
    if get_origin(kind):
        inner = ", ".join("..." if part is Ellipsis else type_name(part) for part in get_args(kind))
        return f"{get_origin(kind).__name__}[{inner}]"
    return getattr(kind, "__name__", str(kind))


def field_comments(cls: type) -> dict[str, str]:
    """What is said about each field: its metadata "help", else the comment on its line, else the comments above."""
    comments: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if is_dataclass(owner):
            comments.update(_comments_in_source(owner))
    for field in fields(cls):
        if "help" in field.metadata:
            comments[field.name] = field.metadata["help"]
    return comments


def _comments_in_source(cls: Any) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}  # made at run time: no source, no comments
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    alone = {line for line, token in comments.items() if token.line.lstrip().startswith("#")}
    found: dict[str, str] = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        lines = [line for line in range(node.lineno, (node.end_lineno or node.lineno) + 1) if line in comments]
        if not lines:
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = list(range(first, node.lineno))
        if lines:
            found[node.target.id] = " ".join(comments[line].string.lstrip("# ") for line in lines)
    return found

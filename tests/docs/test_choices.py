"""docs/reproduce.md has a row for each value that the recipes mark (ours), with that value, and no other row."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from docs.prepared import ROOT

from gasp_fast.config.loader import keys_of, load_config
from gasp_fast.training.config import TrainConfig

RECIPES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if "tiny" not in path.name)
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
MARK = "(ours)"


def scalars(node: yaml.Node, above: str = "") -> Iterator[tuple[int, str, str]]:
    """(line, key, text) of each value of a YAML mapping."""
    assert isinstance(node, yaml.MappingNode)
    for key, value in node.value:
        path = f"{above}{key.value}"
        if isinstance(value, yaml.MappingNode):
            yield from scalars(value, f"{path}.")
        else:
            yield key.start_mark.line, path, value.value


def marked(text: str) -> dict[str, str]:
    """The keys of a recipe whose line is marked, with their values as they are written."""
    lines = text.splitlines()
    by_line = {line: (key, value) for line, key, value in scalars(yaml.compose(text)) if MARK in lines[line]}
    unread = [n for n, line in enumerate(lines) if MARK in line and not line.startswith("#") and n not in by_line]
    assert not unread, f"lines {unread} are marked, but hold no value"
    return dict(by_line.values())


def documented(text: str) -> dict[str, set[str]]:
    """The keys of the table, with all values in the column of ours."""
    [table] = re.findall(r"^\| key \| .*\n\|[- |]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    found = {}
    for row in table.splitlines():
        key, _, ours, why = (cell.strip() for cell in row.strip("|").split("|"))
        [name] = re.findall(r"^`([\w.]+)`$", key)
        assert why and name not in found
        found[name] = set(re.findall(r"`([^`]+)`", ours))
    return found


def test_the_table_and_the_marks_of_the_recipes_agree() -> None:
    marks = defaultdict(set)
    for path in RECIPES:
        for key, value in marked(path.read_text()).items():
            marks[key].add(value)
    table = documented((ROOT / "docs" / "reproduce.md").read_text())
    assert table == marks
    assert len(table) >= 20 and table.keys() <= set(keys_of(TrainConfig))


def test_a_mark_is_read_with_its_key_and_value() -> None:
    text = "# values (ours)\na:\n  b: 1e-6  # small (ours)\n  c:\n    d: [1, 2]\n    e: null  # (ours), too\nf: 2\n"
    assert marked(text) == {"a.b": "1e-6", "a.c.e": "null"}
    with pytest.raises(AssertionError, match="hold no value"):
        marked("a:\n  # (ours)\n  b: 1\n")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_hold_out_the_scenes_that_the_recipes_hold_out(path: Path) -> None:
    shares = {load_config(TrainConfig, recipe).data.scenes.held_out for recipe in RECIPES}
    given = re.findall(r"data/dl3dv .*--held-out ([\d.]+)", path.read_text())
    assert len(shares) == 1 and set(map(float, given)) <= shares
    assert given or path.name not in ("reproduce.md", "data.md")

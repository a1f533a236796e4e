"""List the recipes of the package, or print one, to change a copy of it.

Each can be named in `gasp-fast train` and `gasp-fast plan`. Its first comment says what it is for. With --keys, print
every key with its values, its default and its meaning (docs/configuration.md).

examples:
  gasp-fast recipes
  gasp-fast recipes qwen2_5_vl_7b
  gasp-fast recipes --keys
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "list the recipes of the package, or print one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="RECIPE", help="the recipe to print")
    parser.add_argument(
        "--keys", nargs="?", const="text", choices=("text", "markdown"), help="print every key of a recipe instead"
    )


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.config.recipes import SHARDINGS, recipe_file, recipe_names

    if arguments.keys:
        from gasp_fast.config.reference import as_markdown, as_text, groups_of
        from gasp_fast.g2vlm.config import G2TrainConfig
        from gasp_fast.training.config import TrainConfig

        kinds = {"": groups_of(TrainConfig), "G²VLM": groups_of(G2TrainConfig)}
        print(as_text(kinds) if arguments.keys == "text" else as_markdown(kinds), end="")
        return 0
    if arguments.name is not None:
        print(recipe_file(arguments.name).read_text(encoding="utf-8"), end="")
        return 0
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {purpose(recipe_file(name))}")
    print(f"\ndeepspeed = {', '.join(sorted(path.stem for path in SHARDINGS.glob('*.json')))}")
    return 0


def purpose(recipe: Path) -> str:
    """The first sentence of a recipe's first comment."""
    comment = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    sentence, _, _ = " ".join(comment).partition(". ")
    return sentence.rstrip(".")

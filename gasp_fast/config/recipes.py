"""The recipes of the package by name: `qwen2_5_vl_7b` is `configs/qwen2_5_vl_7b.yaml`, which an installation contains.

`gasp_fast/recipes` is a link to `configs/`; a wheel has a copy in its place.
"""

from __future__ import annotations

import difflib
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"
SHARDINGS = RECIPES / "deepspeed"


def recipe_names() -> list[str]:
    """Every recipe, without its suffix: "qwen2_5_vl_7b", "ablations/qwen_rank_64"."""
    files = sorted(RECIPES.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return [path.relative_to(RECIPES).with_suffix("").as_posix() for path in files]


def recipe_file(name: str | Path) -> Path:
    """A file with this path; or the recipe of the package with this name."""
    path = Path(name)
    if path.is_file():
        return path
    names = recipe_names()
    short = path.with_suffix("").as_posix().removeprefix("configs/")  # as it is called where the repository is
    if short in names:
        return RECIPES / f"{short}.yaml"
    similar = difflib.get_close_matches(short, names, n=1, cutoff=0.5)
    nearest = f"the nearest recipe is {similar[0]} (gasp-fast recipes lists all)" if similar else ""
    raise FileNotFoundError(
        f"{path}: no such file, and no recipe of this name; {nearest or 'gasp-fast recipes lists all'}"
    )


def sharding_file(name: str) -> Path:
    """A DeepSpeed configuration with this path; or that of the package with this name: "zero1"."""
    path = Path(name)
    if path.is_file():
        return path
    own = SHARDINGS / f"{path.name.removesuffix('.json')}.json"
    return own if path.parent.as_posix() in (".", "configs/deepspeed") and own.is_file() else path

"""Arguments of `gasp-fast train` and of `python -m gasp_fast.train`, which are the same command."""

from __future__ import annotations

import argparse
from typing import NoReturn

DESCRIPTION = """\
Train a vision-language model with geometric supervision, alone, under torchrun or under deepspeed.

Reads a recipe: a YAML file, or the name of one of the package (gasp-fast recipes lists them). Every key can be
overridden. Writes into run.out: config.yaml with all values, run.json (what ran), log.jsonl, skipped.jsonl (samples
that could not be used), checkpoint-N/, and at the end training.png. The same command resumes a run that was stopped."""

EXAMPLES = """\
  gasp-fast train tiny_cpu train.steps=100
  gasp-fast train qwen2_5_vl_7b run.out=runs/first --dry-run"""

MODULE_EXAMPLES = """\
  python -m gasp_fast.train tiny_cpu train.steps=100
  python -m gasp_fast.training.launch --nproc-per-node 8 -m gasp_fast.train qwen2_5_vl_7b
  deepspeed --module gasp_fast.train my_recipe.yaml"""


class RecipeParser(argparse.ArgumentParser):
    """Where the recipe is missing, its error names the command that lists them."""

    def error(self, message: str) -> NoReturn:
        if message.endswith("required: RECIPE"):
            message += "; give a YAML file, or a name from the list of gasp-fast recipes"
        super().error(message)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="RECIPE", help="a YAML file, or the name of a recipe of the package")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="replaces a value of the recipe"
    )
    parser.add_argument("--dry-run", action="store_true", help="build everything, run one step, report, stop")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error came from")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # older launchers pass it

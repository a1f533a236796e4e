"""Train a recipe in this process. `python -m gasp_fast.train` is the same, for torchrun and deepspeed."""

from __future__ import annotations

import argparse

from gasp_fast.config.train_command import DESCRIPTION, EXAMPLES, add_arguments

HELP = "train a recipe, alone; python -m gasp_fast.train under torchrun or deepspeed"
__doc__ = f"{DESCRIPTION}\n\nexamples:\n{EXAMPLES}"
__all__ = ["HELP", "add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    from gasp_fast.train import run as train

    return train(arguments, since_process=True, command="gasp-fast train")

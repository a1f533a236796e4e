"""Runs a command of `gasp-fast` in this process."""

from __future__ import annotations

import argparse
from types import ModuleType


def run(command: ModuleType, *words: object) -> int:
    """The exit code of the command's module; its errors are raised."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))

"""`gasp-fast COMMAND`: one module of this folder per command, imported only when it is called.

A command module offers `HELP` (one line), `add_arguments(parser)` and `run(arguments) -> int` (the exit code).
Whatever a user can mend is raised as `ValueError`, `OSError` or `CommandError` and shown as one line.
"""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS: dict[str, str] = {}


def main(argv: list[str] | None = None) -> int:
    raise SystemExit(0)

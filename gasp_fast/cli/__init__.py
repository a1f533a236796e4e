"""`gasp-fast COMMAND`: one module of this folder per command, imported only when it is called.

A command module offers `HELP` (one line), `add_arguments(parser)` and `run(arguments) -> int` (the exit code). What a
user can mend is raised as `ValueError`, `TypeError` or `OSError` and shown as one line; anything else is a bug, and
keeps its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

COMMANDS = {  # name -> one line of help; the module has the same name
    "scenes": "what scenes a folder holds, and whether their geometry agrees with itself",
    "tracks": "precompute point tracks of many scenes",
    "depth": "give depth to scenes that have none",
    "render": "render synthetic scenes with exact depth",
    "make-vqa": "turn tracks into question-answer pairs (the fairness baseline)",
    "evaluate": "report which correspondences a model's layers know",
    "compare": "several reports in one figure",
    "export": "merge adapters, drop heads, and write a plain Hugging Face model",
    "plan": "predict memory, time and GPU-hours of a recipe",
    "bench": "kernel microbenchmarks against peers",
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from gasp_fast import __version__

        print(__version__)
        return 0
    name = words[0]
    if name not in COMMANDS:
        print(f"gasp-fast: no command {name!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command = _module(name)
    parser = argparse.ArgumentParser(
        prog=f"gasp-fast {name}", description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_arguments(parser)
    try:
        return int(command.run(parser.parse_args(words[1:])))
    except (ValueError, TypeError, OSError) as error:
        print(f"gasp-fast {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"gasp-fast {name}: interrupted", file=sys.stderr)
        return 130


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: gasp-fast COMMAND [options]", "", *rows, "", "gasp-fast COMMAND --help tells more."])

"""`gasp-fast COMMAND`: each command is one module of this folder, imported only when it runs.

A command module defines `HELP` (one line, a plain string), `add_arguments(parser)` and `run(arguments) -> int` (the
exit code). Its docstring is the text of its `--help`: what it reads and writes, then, after a line `examples:`,
commands that can be typed as they are. `ValueError`, `TypeError` and `OSError` are the user's to fix and are printed as
one line; so is a missing package. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from gasp_fast.config.train_command import RecipeParser
from gasp_fast.files import one_line
from gasp_fast.processes import print_anything

GROUPS = {  # in the order of use; a command's module has its name, with _ for -
    "installation": ("doctor",),
    "scenes": ("render", "scenes", "depth", "tracks", "make-vqa"),
    "training": ("recipes", "plan", "train", "curves"),
    "trained models": ("evaluate", "compare", "export", "benchmark", "compare-benchmarks"),
    "G²VLM": ("geometry", "reconstruct"),
    "benchmark and shell": ("bench", "completion"),
}
COMMANDS = tuple(name for names in GROUPS.values() for name in names)


class CommandHelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions, and adds the default of an option to its help, unless it is there."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        no_default = action.default is None or action.default is False or action.default is argparse.SUPPRESS
        if no_default or not action.option_strings or "default" in text or f"({action.default}" in text:
            return text
        return f"{text} (default: %(default)s)"


class CommandParser(RecipeParser):
    """A parser whose errors are short, also where they quote a value."""

    def error(self, message: str) -> NoReturn:
        super().error(one_line(ValueError(message)))


def main(argv: Sequence[str] | None = None) -> int:
    print_anything()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        from gasp_fast import __version__

        print(__version__)
        return 0
    name = words[0]
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        cure = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(COMMANDS)}"
        print(f"gasp-fast: no command {name!r}; {cure}", file=sys.stderr)
        return 2
    try:
        command = load(name)
        return int(command.run(parser_of(name, command).parse_intermixed_args(words[1:])))
    except ModuleNotFoundError as error:
        package = (error.name or "gasp_fast").split(".")[0]
        if package == "gasp_fast":
            raise  # a missing module of this package is a bug
        cure = f"run {sys.executable} -m pip install {package}" if name == "doctor" else "run gasp-fast doctor"
        print(f"gasp-fast {name}: {package} is not installed; {cure}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError) as error:
        print(f"gasp-fast {name}: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"gasp-fast {name}: interrupted", file=sys.stderr)
        return 130


def load(name: str) -> Any:
    """The module of a command."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def parser_of(name: str, command: Any) -> argparse.ArgumentParser:
    description, _, examples = (command.__doc__ or "").partition("\nexamples:\n")
    parser = CommandParser(
        prog=f"gasp-fast {name}",
        description=description.strip(),
        epilog=f"examples:\n{examples.rstrip()}" if examples else None,
        formatter_class=CommandHelpFormatter,
    )
    command.add_arguments(parser)
    return parser


def overview() -> str:
    lines = ["usage: gasp-fast COMMAND [options]", ""]
    width = max(map(len, COMMANDS))
    for title, names in GROUPS.items():
        lines += [f"{title}:", *(f"  {name:<{width}}  {one_line_help(name)}" for name in names)]
    return "\n".join(
        [*lines, "", "gasp-fast COMMAND --help shows what a command reads and writes, its options, and examples."]
    )


def one_line_help(name: str) -> str:
    """`HELP` of a command's module, parsed from its source: importing every command takes seconds and all packages."""
    source = pkgutil.get_data(__name__, f"{name.replace('-', '_')}.py") or b""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "HELP":
            return str(ast.literal_eval(statement.value))
    raise LookupError(f"gasp_fast/cli: the module of {name!r} has no HELP")

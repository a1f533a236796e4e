"""Print a script that completes gasp-fast in a shell: commands, options, choices, files and folders.

The script lists the options of this version; print it again after an update. A command whose packages are not
installed is completed by its name alone. Needs the package shtab (in the extra `data`).

examples:
  source <(gasp-fast completion bash)                                    # in ~/.bashrc
  gasp-fast completion zsh > ~/.zfunc/_gasp-fast                         # with fpath+=(~/.zfunc) before compinit
  gasp-fast completion fish > ~/.config/fish/completions/gasp-fast.fish
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gasp_fast import cli

HELP = "print a script that completes commands, options and files in bash, zsh or fish"
FOLDERS = ("DIR", "MODEL", "RUN", "REPORT")  # metavars of arguments that are folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="shell that reads the script")


def run(arguments: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(_parser_of_all_commands(), shell=arguments.shell))
    return 0


def _parser_of_all_commands() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gasp-fast")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    for name in cli.COMMANDS:
        try:
            parents = [cli.parser_of(name, cli.load(name))]
        except ImportError as error:
            print(f"gasp-fast completion: {name} without its options: {error}", file=sys.stderr)
            parents = []
        command = commands.add_parser(name, help=cli.one_line_help(name), parents=parents, add_help=False)
        for action in command._actions:
            _describe_values(action)
    return parser


def _describe_values(action: argparse.Action) -> None:
    """Tells shtab whether the argument is a folder or a file."""
    import shtab

    if action.choices and any(" " in choice for choice in action.choices):
        action.choices = None  # shtab would offer each word by itself
    elif action.metavar in FOLDERS:
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    elif action.type is Path:
        action.complete = shtab.FILE  # type: ignore[attr-defined]

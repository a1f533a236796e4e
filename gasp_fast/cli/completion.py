"""Print a script that makes a shell complete gasp-fast: commands, options, their choices, files and folders.

The script is made from the commands' own parsers, so print it anew after an update. A command that cannot be loaded
because a package is missing is completed by its name alone.

examples:
  source <(gasp-fast completion bash)                                    # in ~/.bashrc
  gasp-fast completion zsh > ~/.zfunc/_gasp-fast                         # with fpath+=(~/.zfunc) before compinit
  gasp-fast completion fish > ~/.config/fish/completions/gasp-fast.fish
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gasp_fast import cli

HELP = "a script that completes commands, options and files in bash, zsh or fish"
FOLDERS = ("DIR", "MODEL", "RUN", "REPORT")  # metavars of what is a folder; any other path may be a file
FILES = ("FILE", "CONFIG", "PATH")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="the shell that shall complete")


def run(arguments: argparse.Namespace) -> int:
    sys.stdout.write(SCRIPTS[arguments.shell]([_command(name) for name in cli.COMMANDS]))
    return 0


# ---- what can be completed ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Argument:
    """An option or, without flags, a positional argument."""

    flags: tuple[str, ...]
    help: str
    takes: str  # "nothing", "words", "folder", "file", "anything"
    words: tuple[str, ...] = ()
    many: bool = False  # takes all words up to the next option


@dataclass(frozen=True)
class Command:
    name: str
    help: str
    arguments: tuple[Argument, ...]

    @property
    def options(self) -> list[Argument]:
        return [argument for argument in self.arguments if argument.flags]

    @property
    def positional(self) -> list[Argument]:
        return [argument for argument in self.arguments if not argument.flags]

    @property
    def flags(self) -> list[str]:
        return [flag for option in self.options for flag in option.flags if flag.startswith("--")]


def _command(name: str) -> Command:
    try:
        parser = cli.parser_of(name, cli.load(name))
    except ImportError as error:
        print(f"gasp-fast completion: {name} without its options: {error}", file=sys.stderr)
        return Command(name, cli.one_line_help(name), ())
    arguments = [_argument(action, parser) for action in parser._actions if action.help is not argparse.SUPPRESS]
    return Command(name, cli.one_line_help(name), tuple(arguments))


def _argument(action: argparse.Action, parser: argparse.ArgumentParser) -> Argument:
    help_text = (action.help or "") % {**vars(action), "prog": parser.prog}
    words = tuple(map(str, action.choices or ()))
    if action.nargs == 0:
        takes = "nothing"
    elif words:
        takes = "words"
    elif action.metavar in FOLDERS:
        takes = "folder"
    else:
        takes = "file" if action.metavar in FILES or action.type is Path else "anything"
    return Argument(tuple(action.option_strings), help_text, takes, words, action.nargs in ("+", "*"))


# ---- bash -----------------------------------------------------------------------------------------------------------

BASH = """\
# bash completion for gasp-fast, made by: gasp-fast completion bash

_gasp_fast() {{
  local command="${{COMP_WORDS[1]}}" current="${{COMP_WORDS[COMP_CWORD]}}" option="" distance=0 i
  COMPREPLY=()
  if ((COMP_CWORD == 1)); then
    _gasp_fast_words {names}
    return
  fi
  # The option before the cursor, and how many words ago it was. Bash makes three words of --option=value.
  for ((i = COMP_CWORD - 1; i > 1; i--)); do
    [[ ${{COMP_WORDS[i]}} == "=" ]] && continue
    ((distance += 1))
    if [[ ${{COMP_WORDS[i]}} == -* ]]; then
      option="${{COMP_WORDS[i]}}"
      break
    fi
  done
  [[ $current == "=" ]] && current=""
  if [[ $current == -* ]]; then
    case "$command" in
{flags}
    esac
    return
  fi
  # What an option takes; where that cannot be guessed, nothing.
  case "$((distance == 1 ? 1 : 2)) $command $option" in
{values}
  esac
  case "$command" in
{positional}
  esac
}}

_gasp_fast_words() {{
  local word
  for word in "$@"; do
    [[ $word == "$current"* ]] && COMPREPLY+=("$(printf %q "$word")")
  done
}}

_gasp_fast_files() {{
  compopt -o filenames 2> /dev/null
  local IFS=$'\\n'
  COMPREPLY=($(compgen "$1" -- "$current"))
}}

complete -F _gasp_fast gasp-fast
"""


def _bash(commands: list[Command]) -> str:
    flags, values, positional = [], [], []
    for command in commands:
        flags.append(f"      {command.name}) {_bash_words(command.flags)} ;;")
        patterns: dict[str, list[str]] = {}  # those whose values are completed alike
        for option in command.options:
            if option.takes != "nothing":
                words = [f" {command.name} {flag}" for flag in option.flags]
                near = [f'?"{word}"' if option.many else f'"1{word}"' for word in words]
                patterns.setdefault(_bash_action(option), []).extend(near)
        values += [f"    {' | '.join(names)}) {action}; return ;;" for action, names in patterns.items()]
        guessed = [argument for argument in command.positional if argument.takes != "anything"]
        positional += [f"    {command.name}) {_bash_action(argument)} ;;" for argument in guessed[:1]]
    names = [*(command.name for command in commands), "--help", "--version"]
    return BASH.format(
        names=shlex.join(names), flags=_lines(flags), values=_lines(values), positional=_lines(positional)
    )


def _bash_action(argument: Argument) -> str:
    actions = {"folder": "_gasp_fast_files -d", "file": "_gasp_fast_files -f", "anything": ":"}
    return actions.get(argument.takes) or _bash_words(argument.words)


def _bash_words(words: Iterable[str]) -> str:
    return f"_gasp_fast_words {shlex.join(words)}"


# ---- zsh ------------------------------------------------------------------------------------------------------------

ZSH = """\
#compdef gasp-fast
# zsh completion for gasp-fast, made by: gasp-fast completion zsh

_gasp_fast() {{
  local -a commands
  commands=(
{names}
  )
  if ((CURRENT == 2)); then
    _describe -t commands command commands
    return
  fi
  local command="${{words[2]}}"
  words=("gasp-fast $command" "${{(@)words[3,-1]}}")
  ((CURRENT--))
  case "$command" in
{cases}
  esac
}}

if [[ $funcstack[1] == _gasp-fast ]]; then
  _gasp_fast "$@"
else
  compdef _gasp_fast gasp-fast
fi
"""


def _zsh(commands: list[Command]) -> str:
    names = [f"    {shlex.quote(_zsh_text(command.name) + ':' + command.help)}" for command in commands]
    cases = []
    for command in commands:
        lines = [f"      {spec}" for argument in command.arguments for spec in _zsh_specs(argument)]
        cases.append(f"    {command.name})\n    _arguments -S \\\n" + " \\\n".join(lines) + "\n    ;;" if lines else "")
    return ZSH.format(names=_lines(names), cases=_lines(filter(None, cases)))


def _zsh_specs(argument: Argument) -> list[str]:
    """Specifications of zsh's `_arguments`: an option as often as it has names, a positional once."""
    action = {"folder": "_files -/", "file": "_files", "anything": " ", "nothing": ""}.get(argument.takes)
    if action is None:
        words = [_zsh_text(word).replace(" ", "\\ ") for word in argument.words]
        action = f"({' '.join(words)})"
    if not argument.flags:
        return [shlex.quote(f"{'*' if argument.many else ''}:{_zsh_text(argument.help)}:{action}")]
    value = f":value:{action}" if action else ""
    if argument.many:
        value = f":*-*{value}"
    return [shlex.quote(f"{flag}[{_zsh_text(argument.help)}]{value}") for flag in argument.flags]


def _zsh_text(text: str) -> str:
    """Without what `_arguments` reads as its own punctuation."""
    for sign in "\\:[]()":
        text = text.replace(sign, f"\\{sign}")
    return text


# ---- fish -----------------------------------------------------------------------------------------------------------

FISH = """\
# fish completion for gasp-fast, made by: gasp-fast completion fish

function __gasp_fast_command
    set -l words (commandline -opc)
    test (count $words) -gt 1; and test $words[2] = $argv[1]
end

complete -c gasp-fast -f
{names}
{arguments}
"""


def _fish(commands: list[Command]) -> str:
    first = "complete -c gasp-fast -n 'test (count (commandline -opc)) -eq 1'"
    names = [f"{first} -a {command.name} -d {_fish_quote(command.help)}" for command in commands]
    lines = []
    for command in commands:
        chosen = f"complete -c gasp-fast -n '__gasp_fast_command {command.name}'"
        for option in command.options:
            flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags)
            lines.append(f"{chosen} {flags} -d {_fish_quote(option.help)}{_fish_values(option, ' -x')}")
        guessed = [argument for argument in command.positional if argument.takes != "anything"]
        lines += [f"{chosen}{_fish_values(argument, '')}" for argument in guessed]
    return FISH.format(names=_lines(names), arguments=_lines(lines))


def _fish_values(argument: Argument, exclusive: str) -> str:
    if argument.takes == "words":
        words = [word.replace(" ", "\\ ") for word in argument.words]
        return f"{exclusive} -a {_fish_quote(' '.join(words))}"
    if argument.takes == "folder":
        return f"{exclusive} -a '(__fish_complete_directories)'"
    if argument.takes == "file":
        return f"{' -r' if exclusive else ''} -F"
    return exclusive if argument.takes == "anything" else ""


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}

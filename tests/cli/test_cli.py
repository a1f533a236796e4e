"""The command line as a newcomer meets it: the overview, each command's help, completion."""

import argparse
import contextlib
import io
import json
import pkgutil
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gasp_fast import cli
from gasp_fast.cli import completion

ROOT = Path(__file__).parents[2]
ALONE = """
import sys, types
package = types.ModuleType("gasp_fast")  # the package's own face imports torch; this is about the command line
package.__path__ = [sys.argv[1]]
sys.modules["gasp_fast"] = package
"""


def parser_of(name):
    return cli.parser_of(name, cli.load(name))


def help_of(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # no line of it is broken in two
    return parser_of(name).format_help()


def options_of(name):
    return [action for action in parser_of(name)._actions if action.help is not argparse.SUPPRESS]


# ---- help -----------------------------------------------------------------------------------------------------------


def test_every_module_of_the_folder_is_a_command_and_stands_in_the_overview(capsys):
    modules = {module.name.replace("_", "-") for module in pkgutil.iter_modules(cli.__path__)}
    assert modules == set(cli.COMMANDS)
    assert cli.main([]) == cli.main(["--help"]) == 0
    told = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in told and cli.load(name).HELP in told
    assert "python -m gasp_fast.train CONFIG.yaml" in told


def test_the_overview_loads_no_command_and_is_quick():
    code = (
        ALONE
        + """
import time
start = time.process_time()
from gasp_fast.cli import main
assert main(["--help"]) == 0
took = time.process_time() - start
import json
heavy = {"torch", "numpy", "rich", "gasp_fast.cli.scenes"} & set(sys.modules)
print(json.dumps([took, sorted(heavy)]))
"""
    )
    out = subprocess.run([sys.executable, "-c", code, str(ROOT / "gasp_fast")], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    took, heavy = json.loads(out.stdout.splitlines()[-1])
    assert heavy == [] and took < 0.3


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_mentions_every_option_and_its_default(name, monkeypatch):
    told = help_of(name, monkeypatch)
    assert f"usage: gasp-fast {name} " in told
    for action in options_of(name):
        assert action.help, f"{name} {action.dest} has no help"
        if not action.option_strings:
            continue
        line = next(line for line in told.splitlines() if line.strip().startswith(action.option_strings[0]))
        if isinstance(action.default, (int, float)) and action.default is not False:
            assert str(action.default) in line or "all cores" in line
        if action.nargs != 0 and not action.choices:
            assert action.metavar is not None, f"{name} {action.option_strings}: say what it takes"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_exits_with_0(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, "--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == parser_of(name).format_help()


def examples_of(name):
    text = parser_of(name).epilog or ""
    return [words for line in text.splitlines()[1:] if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_are_commands_that_the_parser_takes(name):
    examples = [words[: words.index(">")] if ">" in words else words for words in examples_of(name)]
    assert examples
    for words in examples:
        words = shlex.split(" ".join(words).replace("source <(", "").rstrip(")")) if words[0] == "source" else words
        assert words[:2] == ["gasp-fast", name]
        parser_of(name).parse_args(words[2:])  # exits where it does not


def test_defaults_are_told_once():
    parser = argparse.ArgumentParser(prog="x", formatter_class=cli.HelpFormatter)
    parser.add_argument("--size", type=int, default=7, help="of it")
    parser.add_argument("--seed", type=int, default=0, help="of it")
    parser.add_argument("--workers", type=int, default=8, help="(default: all cores)")
    parser.add_argument("--grid", type=int, default=9, help="points (9)")
    parser.add_argument("--force", action="store_true", help="do it")
    told = parser.format_help()
    for line in ("of it (default: 7)", "of it (default: 0)", "--workers WORKERS  (default: all cores)\n"):
        assert line in told
    assert "points (9)\n" in told and "do it\n" in told


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_a_mistyped_command_is_told_the_nearest(capsys):
    assert cli.main(["evalute"]) == 2
    assert capsys.readouterr().err == "gasp-fast: no command 'evalute'; did you mean evaluate?\n"
    assert cli.main(["xyzzy"]) == 2
    assert "choose one of doctor, render" in capsys.readouterr().err


def test_a_package_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "gasp_fast.cli.compare", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)  # as if rich were not there
    assert cli.main(["compare", "a", "--out", "b"]) == 1
    told = capsys.readouterr().err
    assert told == "gasp-fast compare: rich is not installed; gasp-fast doctor says how to\n"


def test_a_missing_part_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.delitem(sys.modules, "gasp_fast.cli.compare", raising=False)
    monkeypatch.setitem(sys.modules, "gasp_fast.cli.compare", None)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["compare", "a", "--out", "b"])


# ---- completion -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in completion.SCRIPTS:
        with contextlib.redirect_stdout(io.StringIO()) as told:
            assert cli.main(["completion", shell]) == 0
        (folder / shell).write_text(told.getvalue())
    return folder


def completed(scripts, cwd, *words):
    """What bash would offer for the last of `words`."""
    code = f"""
set -u
source {shlex.quote(str(scripts / "bash"))}
COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}
_gasp_fast
[[ ${{#COMPREPLY[@]}} == 0 ]] || printf '%s\\n' "${{COMPREPLY[@]}}"
complete -p gasp-fast >&2
"""
    out = subprocess.run(["bash", "--norc", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=30)
    assert out.stderr == "complete -F _gasp_fast gasp-fast\n"
    return out.stdout.splitlines()


def test_bash_completes_commands_options_choices_files_and_folders(scripts, tmp_path):
    (tmp_path / "my scenes").mkdir()
    (tmp_path / "my notes.txt").touch()

    def complete(*words):
        return completed(scripts, tmp_path, "gasp-fast", *words)

    assert complete("") == [*cli.COMMANDS, "--help", "--version"]
    assert complete("ev") == ["evaluate"]
    assert complete("evaluate", "--sc") == ["--scenes"]
    assert set(complete("export", "--")) == {"--help", "--out", "--base", "--dtype", "--device", "--tolerance"}
    assert complete("evaluate", "--rope", "") == ["before", "after"]
    assert complete("evaluate", "--rope", "=", "be") == ["before"]  # --rope=be
    assert complete("evaluate", "--rope", "=") == ["before", "after"]
    assert complete("evaluate", "--rope", "before", "--dtype", "b") == ["bfloat16"]
    assert complete("evaluate", "--scenes", "my") == ["my scenes"]
    assert sorted(complete("doctor", "--json", "my")) == ["my notes.txt", "my scenes"]
    assert complete("evaluate", "--sequences", "") == []  # a number: nothing to offer
    assert complete("export", "m") == ["my scenes"]
    assert complete("export", "run", "--device", "cpu", "m") == ["my scenes"]
    assert complete("bench", "--only", "ours", "dense") == ["dense\\ eager", "dense\\ compiled"]  # several, with blanks
    assert complete("completion", "") == ["bash", "zsh", "fish"]


def test_a_command_that_cannot_be_loaded_is_completed_by_its_name(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "gasp_fast.cli.compare", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert completion._command("compare") == completion.Command("compare", cli.one_line_help("compare"), ())
    assert capsys.readouterr().err.startswith("gasp-fast completion: compare without its options: ")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed here")
def test_zsh_reads_its_script(scripts):
    subprocess.run(["zsh", "-f", "-n", str(scripts / "zsh")], check=True)


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed here")
def test_fish_completes_options_and_choices(scripts):
    def complete(line):
        code = f"source {shlex.quote(str(scripts / 'fish'))}; complete -C {shlex.quote(line)}"
        out = subprocess.run(["fish", "-N", "-c", code], capture_output=True, text=True, check=True, timeout=30)
        return {line.split("\t")[0] for line in out.stdout.splitlines()}

    assert complete("gasp-fast ev") == {"evaluate"}
    assert complete("gasp-fast evaluate --rope ") == {"before", "after"}
    assert complete("gasp-fast evaluate --scenes scenes --ba") == {"--batch"}


def test_every_option_is_in_the_script_of_every_shell(scripts):
    for name in cli.COMMANDS:
        flags = {flag for action in options_of(name) for flag in action.option_strings if flag.startswith("--")}
        bash = next(line for line in (scripts / "bash").read_text().splitlines() if line.startswith(f"      {name}) "))
        assert set(shlex.split(bash)[2:-1]) == flags
        fish = (scripts / "fish").read_text()
        assert all(f"'__gasp_fast_command {name}'" in fish and f" -l {flag[2:]} " in fish for flag in flags)
        zsh = (scripts / "zsh").read_text().split(f"\n    {name})\n")[1].split(";;")[0]
        assert all(f"'{flag}[" in zsh for flag in flags)

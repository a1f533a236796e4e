"""The command line: overview, help of each command, errors, shell completion."""

import argparse
import contextlib
import dataclasses
import importlib
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
from gasp_fast import train as training

ROOT = Path(__file__).parents[2]
ALONE = """
import sys, types
package = types.ModuleType("gasp_fast")  # in place of gasp_fast/__init__.py, which imports torch
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


def test_every_module_of_the_folder_is_a_command_in_the_overview(capsys):
    modules = {module.name.replace("_", "-") for module in pkgutil.iter_modules(cli.__path__)}
    assert modules == set(cli.COMMANDS)
    assert cli.main([]) == cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in overview and cli.load(name).HELP in overview
    assert "python -m gasp_fast.train under torchrun" in overview


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
    text = help_of(name, monkeypatch)
    assert f"usage: gasp-fast {name} " in text
    for action in options_of(name):
        assert action.help, f"{name} {action.dest} has no help"
        if not action.option_strings:
            continue
        line = next(line for line in text.splitlines() if line.strip().startswith(action.option_strings[0]))
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


@pytest.mark.parametrize(
    ("name", "configurations"),
    [
        ("evaluate", ["evaluation.dataset.EvaluationSetConfig", "evaluation.evaluate.EvaluationConfig"]),
        ("tracks", ["data.tracks.sequences.SequenceConfig", "data.annotations.settings.AnnotationSettings"]),
        ("make-vqa", ["data.questions.from_tracks.VQAConfig"]),
    ],
)
def test_defaults_of_options_are_those_of_the_configuration(name, configurations):
    """Parsers repeat them, because `--help` must not import what the configuration needs."""
    options = {action.dest: action.default for action in options_of(name)}
    for configuration in configurations:
        module, _, cls = configuration.rpartition(".")
        fields = dataclasses.fields(getattr(importlib.import_module(f"gasp_fast.{module}"), cls))
        for field in fields:
            if options.get(field.name) is not None and field.name != "features":
                assert options[field.name] == field.default, field.name


def test_help_states_each_default_once():
    parser = argparse.ArgumentParser(prog="x", formatter_class=cli.CommandHelpFormatter)
    parser.add_argument("--size", type=int, default=7, help="of it")
    parser.add_argument("--seed", type=int, default=0, help="of it")
    parser.add_argument("--workers", type=int, default=8, help="(default: all cores)")
    parser.add_argument("--grid", type=int, default=9, help="points (9)")
    parser.add_argument("--force", action="store_true", help="do it")
    text = parser.format_help()
    for line in ("of it (default: 7)", "of it (default: 0)", "--workers WORKERS  (default: all cores)\n"):
        assert line in text
    assert "points (9)\n" in text and "do it\n" in text


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_a_mistyped_command_gets_the_nearest_one(capsys):
    assert cli.main(["evalute"]) == 2
    assert capsys.readouterr().err == "gasp-fast: no command 'evalute'; did you mean evaluate?\n"
    assert cli.main(["xyzzy"]) == 2
    assert "choose one of doctor, render" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "plan", "module"])
def test_without_a_recipe_the_command_that_lists_them_is_named(command, capsys):
    with pytest.raises(SystemExit):
        training.main([]) if command == "module" else cli.main([command])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("required: RECIPE; give a YAML file, or a name from the list of gasp-fast recipes")


def test_a_package_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "gasp_fast.cli.compare", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)  # import then fails as if rich were not installed
    assert cli.main(["compare", "a", "--out", "b"]) == 1
    assert capsys.readouterr().err == "gasp-fast compare: rich is not installed; run gasp-fast doctor\n"


def test_a_missing_module_of_gasp_fast_keeps_its_traceback(monkeypatch):
    monkeypatch.delitem(sys.modules, "gasp_fast.cli.compare", raising=False)
    monkeypatch.setitem(sys.modules, "gasp_fast.cli.compare", None)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["compare", "a", "--out", "b"])


# ---- completion -----------------------------------------------------------------------------------------------------

SHELLS = ("bash", "zsh", "fish")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    pytest.importorskip("shtab")
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert cli.main(["completion", shell]) == 0
        (folder / shell).write_text(printed.getvalue())
    return folder


def completed(script, cwd, *words):
    """What bash offers for the last of `words`."""
    code = f"""
source {shlex.quote(str(script))}
COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}
registered=($(complete -p gasp-fast))  # complete ... -F FUNCTION gasp-fast
"${{registered[-2]}}"
[[ ${{#COMPREPLY[@]}} == 0 ]] || printf '%s\n' "${{COMPREPLY[@]}}"
"""
    out = subprocess.run(["bash", "--norc", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=30)
    assert out.stderr == "" and out.returncode == 0
    return out.stdout.splitlines()


def test_bash_completes_commands_options_choices_files_and_folders(scripts, tmp_path):
    (tmp_path / "my scenes").mkdir()
    (tmp_path / "my notes.txt").touch()

    def complete(*words):
        return completed(scripts / "bash", tmp_path, "gasp-fast", *words)

    assert complete("") == list(cli.COMMANDS)
    assert "--version" in complete("--")
    assert complete("ev") == ["evaluate"]
    assert complete("evaluate", "--sc") == ["--scenes"]
    options = {"--help", "--out", "--base", "--dtype", "--device", "--tolerance", "--adapters", "--push-to-hub"}
    assert set(complete("export", "--")) == options
    assert complete("evaluate", "--rope", "") == ["before", "after"]
    assert complete("evaluate", "--rope", "before", "--dtype", "b") == ["bfloat16"]
    assert complete("evaluate", "--scenes", "my") == ["my scenes"]
    assert sorted(complete("doctor", "--json", "my")) == ["my notes.txt", "my scenes"]
    assert complete("evaluate", "--sequences", "") == []  # a number: nothing to offer
    assert complete("export", "m") == ["my scenes"]
    assert complete("export", "run", "--device", "cpu", "--dtype", "f") == ["fp32", "fp16"]
    assert complete("completion", "") == list(SHELLS)


def test_a_command_whose_packages_are_missing_is_completed_by_its_name(scripts, monkeypatch, capsys, tmp_path):
    monkeypatch.delitem(sys.modules, "gasp_fast.cli.compare", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["completion", "bash"]) == 0
    printed = capsys.readouterr()
    assert "gasp-fast completion: compare without its options: " in printed.err
    (tmp_path / "script").write_text(printed.out)
    assert completed(tmp_path / "script", tmp_path, "gasp-fast", "com") == [
        "compare",
        "compare-benchmarks",
        "completion",
    ]
    assert completed(tmp_path / "script", tmp_path, "gasp-fast", "compare", "--o") == []
    assert completed(tmp_path / "script", tmp_path, "gasp-fast", "doctor", "--j") == ["--json"]


def test_without_shtab_completion_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 1
    assert capsys.readouterr().err == "gasp-fast completion: shtab is not installed; run gasp-fast doctor\n"


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


@pytest.mark.parametrize("shell", SHELLS)
def test_every_option_is_in_the_script_of_every_shell(scripts, shell):
    script = (scripts / shell).read_text()
    for name in cli.COMMANDS:
        for action in options_of(name):
            for flag in filter(lambda flag: flag.startswith("--"), action.option_strings):
                assert (f" -l {flag[2:]} " if shell == "fish" else flag) in script, f"{name} {flag}"

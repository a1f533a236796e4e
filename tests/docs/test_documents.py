"""Every fenced block of README, CONTRIBUTING and docs/ works, or says why it is not run.

The language of a block decides how it is checked:

    python   it is executed
    bash     each command is parsed by the real parser, then run in a folder that holds its inputs (`prepared.py`),
             shortened by the options in `SHORT` and `SHORT_TRAINING`
    yaml     its keys and values are read as part of a training configuration
    text     a listing or a drawing: not checked

A comment on the line above a block changes this:

    <!-- not run: 32 GPUs -->                       commands are still parsed, configurations still read
    <!-- from: examples/custom_backbone.py -->      the block is an excerpt of that file, apart from indentation
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

import pytest
import setuptools  # noqa: F401 - before a document's code imports distutils; otherwise torch.compile fails afterwards
from docs.prepared import ROOT, SHORT, SHORT_TRAINING

from gasp_fast import cli
from gasp_fast import train as training
from gasp_fast.config.loader import load_config
from gasp_fast.data.scenes import formats
from gasp_fast.training.config import TrainConfig

DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"<!-- (not run|from): (.+) -->")
LANGUAGES = ("python", "bash", "yaml", "text")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    where: str  # document:line
    language: str
    text: str
    mark: str | None = None  # "not run", "from"
    note: str = ""  # text of the mark


def blocks(name: str, text: str) -> Iterator[Block]:
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        if fence := re.match(r"( *)(```+)(.*)", lines[at]):
            indent, ticks, language = fence.groups()
            end = next(n for n in range(at + 1, len(lines)) if lines[n].strip() == ticks)
            body = "\n".join(line.removeprefix(indent) for line in lines[at + 1 : end])
            mark = MARK.fullmatch(lines[at - 1].strip()) if at else None
            yield Block(f"{name}:{at + 1}", language.strip(), body, *(mark.groups() if mark else ()))
            at = end
        at += 1


# ---- running a block ---------------------------------------------------------------------------------------


def try_block(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block.where}: language {block.language!r}; known are {', '.join(LANGUAGES)}"
    if block.mark == "from":
        assert bare(block.text) in bare((ROOT / block.note).read_text()), f"{block.where}: not found in {block.note}"
    elif block.language == "python":
        code = compile(block.text, block.where, "exec")
        if block.mark is None:
            exec(code, {"__name__": "__main__"})
    elif block.language == "yaml":
        check_yaml(block)
    elif block.language == "bash":
        for words in commands(block):
            try_command(words, block)


def bare(text: str) -> str:
    """Without indentation and blank lines, which an excerpt may change."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip()) + "\n"


def check_yaml(block: Block) -> None:
    """Reads a part of a recipe on top of the base recipe."""
    base = "" if "base:" in block.text else f"base: {ROOT / 'configs' / 'qwen2_5_vl_7b.yaml'}\n"
    path = Path("block.yaml")
    path.write_text(base + block.text)
    load_config(TrainConfig, path)


def commands(block: Block) -> Iterator[list[str]]:
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables of this command's environment
                words = words[1:]
            yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def try_command(words: list[str], block: Block) -> None:
    """Parses a command of this project, and runs it unless the block is marked. Other commands need the mark."""
    run = block.mark is None
    command = shlex.join(words)
    for word in words:
        if re.match(r"(configs|examples|benchmarks|docs|tests)/", word):
            assert (ROOT / word).exists(), f"{block.where}: {word} does not exist"
    if words[0] == "sbatch":
        words = ["sbatch", *dropwhile(lambda word: word.startswith("--"), words[1:])]
    arguments = training_arguments(words)
    if words[:2] == ["sbatch", "examples/cluster/data.slurm"]:
        parse(words[2:], block)
    elif arguments is not None:
        recipe_of(arguments, block)
        if run and (words[:3] == ["python", "-m", "gasp_fast.train"] or words[0] == "gasp-fast"):
            code = training.main([*arguments, *SHORT_TRAINING])
            assert code == 0, f"{block.where}: {command}: exit code {code}"
            return
    elif words[0] == "gasp-fast":
        parse(words[1:], block)
        if run:
            remove_prepared_output(words)
            assert cli.main([*words[1:], *SHORT.get(words[1], "").split()]) == 0, f"{block.where}: {command}"
        return
    elif words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"{block.where}: {command}: the Makefile has {', '.join(targets)}"
        return
    elif words[0] == "python" and words[1].endswith(".py") and run:
        run_script(words[1:])
        return
    elif words[:2] == ["python", "-c"] and run:
        exec(compile(words[2], block.where, "exec"), {"__name__": "__main__"})
        return
    assert not run, (
        f'{block.where}: {command}: cannot be run here; say why with "<!-- not run: ... -->" above the block'
    )


def remove_prepared_output(words: list[str]) -> None:
    """A document that creates its own MODEL replaces the prepared one."""
    out = Path(words[words.index("--out") + 1]) if "--out" in words else None
    if out is not None and out.is_symlink():
        out.unlink()


def training_arguments(words: list[str]) -> list[str] | None:
    """The arguments of `gasp_fast.train`, whichever launcher starts it; None for another command."""
    if "gasp_fast.train" in words:
        return words[words.index("gasp_fast.train") + 1 :]
    if words[:2] == ["gasp-fast", "train"]:
        return words[2:]
    return words[2:] if words[0] == "sbatch" else None


def recipe_of(arguments: list[str], block: Block) -> TrainConfig:
    """The configuration that the command line reads from `arguments`, without training."""
    read: list[TrainConfig] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", lambda config, **_: read.append(config))
        code = quiet_exit(lambda: training.main(arguments))
    assert code == 0 and read, f"{block.where}: gasp_fast.train does not take {shlex.join(arguments)}"
    return read[0]


def parse(arguments: list[str], block: Block) -> None:
    if arguments[0] in ("--help", "--version"):
        return
    assert arguments[0] in cli.COMMANDS, f"{block.where}: gasp-fast has no command {arguments[0]}"
    parser = cli.parser_of(arguments[0], cli.load(arguments[0]))
    code = quiet_exit(lambda: parser.parse_args(arguments[1:]) and 0)
    assert code == 0, f"{block.where}: gasp-fast does not take {shlex.join(arguments)}"


def quiet_exit(call: Callable[[], int | None]) -> int | str | None:
    try:
        return call()
    except SystemExit as exit:
        return exit.code


def run_script(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


# ---- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_runs(document, workplace, monkeypatch):
    workplace(document)
    monkeypatch.setattr(formats, "FORMATS", formats.FORMATS)
    for block in blocks(document, (ROOT / document).read_text()):
        try_block(block)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document):
    text = (ROOT / document).read_text()
    folders = "configs|examples|docs|benchmarks|gasp_fast|kernels|csrc|tests"
    for name in re.findall(rf"`((?:{folders})/[\w./*-]*)`", text):
        assert list(ROOT.glob(name)) or (ROOT / name).exists(), f"{document}: {name} does not exist"
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in link:
            assert ((ROOT / document).parent / link).exists(), f"{document}: the link {link} leads nowhere"


def test_every_recipe_is_named_in_a_document():
    """A recipe that no document names cannot be found."""
    text = "".join((ROOT / document).read_text() for document in DOCUMENTS)
    for path in (ROOT / "configs").glob("**/*.yaml"):
        name = path.relative_to(ROOT).as_posix()
        starred = re.sub(r"_(rank|layers)_\w+\.yaml", r"_\1_*.yaml", name)
        assert name in text or starred in text, f"no document names {name}"


WRONG = {
    "an unknown option": "```bash\ngasp-fast evaluate --model MODEL --scenes SCENES --out R --layers 3\n```",
    "an unknown option of a block that is not run": "<!-- not run: time -->\n```bash\ngasp-fast bench --speed\n```",
    "an unknown command": "```bash\ngasp-fast measure\n```",
    "an unknown key": "<!-- not run: time -->\n```bash\npython -m gasp_fast.train configs/tiny_cpu.yaml a.b=1\n```",
    "a missing configuration": "<!-- not run: GPUs -->\n```bash\npython -m gasp_fast.train configs/none.yaml\n```",
    "a missing script": "<!-- not run: Slurm -->\n```bash\nsbatch examples/none.slurm configs/tiny_cpu.yaml\n```",
    "an unknown option of a data job": "<!-- not run: Slurm -->\n```bash\nsbatch --array=0-9 "
    "examples/cluster/data.slurm depth DIR --speed\n```",
    "a missing target": "```bash\nmake coffee\n```",
    "a command that fails": "```bash\ngasp-fast scenes NOTHING\n```",
    "another's command without a mark": "```bash\npip install lmms-eval\n```",
    "a launcher without a mark": "```bash\ntorchrun -m gasp_fast.train configs/tiny_cpu.yaml\n```",
    "Python that fails": "```python\nimport gasp_fast.nothing\n```",
    "Python that is none": "<!-- not run: time -->\n```python\nfor\n```",
    "a changed excerpt": "<!-- from: examples/toy.py -->\n```python\nSIZE = 161  # pixels\n```",
    "a wrong value": "```yaml\nlora:\n  rank: many\n```",
    "no language": "```\nmake test\n```",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_block_fails(kind, workplace):
    workplace("README.md")
    [block] = blocks("wrong.md", WRONG[kind])
    with pytest.raises((AssertionError, ImportError, SyntaxError, ValueError)):
        try_block(block)

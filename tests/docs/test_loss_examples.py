"""The training examples run as scripts against the real packages, train, and stay short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAINERS = {"plain_loop": 6, "hf_trainer": 10, "trl_sft": 10}  # and how many lines a reader adds, at most


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def added_lines(script: Path) -> list[str]:
    """The lines between the marks, without blank lines."""
    added, inside = [], False
    for line in script.read_text().splitlines():
        mark = re.fullmatch(r"\s*# --- gasp_fast: (begin|end)", line)
        if mark:
            assert inside == (mark[1] == "end"), f"{script.name}: {line.strip()} without its counterpart"
            inside = mark[1] == "begin"
        elif inside and line.strip():
            added.append(line)
    assert not inside, f"{script.name}: the last block is never closed"
    return added


@pytest.mark.parametrize(("name", "limit"), TRAINERS.items())
def test_a_reader_adds_few_lines(name, limit):
    script = EXAMPLES / f"{name}.py"
    added = added_lines(script)
    assert 4 <= len(added) <= limit, "\n".join(added)
    outside = [line for line in script.read_text().splitlines() if line not in added and "---" not in line]
    code = "\n".join(outside).split('"""')[2]
    for word in ("gasp_fast", "Matches", "attach"):
        assert word not in code, f"{script.name} uses {word} outside the marks"


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_the_example_trains(name):
    if name == "trl_sft":
        pytest.importorskip("trl")
    done = run(str(EXAMPLES / f"{name}.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    head = next(i for i, line in enumerate(lines) if line.split()[0] == "step")
    names = lines[head].split()
    rows = [dict(zip(names, map(float, line.split()), strict=True)) for line in lines[head + 1 :]]
    assert len(rows) >= 4
    first, last = rows[0], rows[-1]
    assert last["text"] < 0.6 * first["text"]
    assert last["corr"] < first["corr"] - 0.5  # more than its variation from step to step
    assert last["PCK@2"] > first["PCK@2"] + 0.05

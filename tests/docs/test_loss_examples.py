"""The training examples run as scripts against the real packages, train, and stay short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAINERS = {"plain_loop": "transformers", "hf_trainer": "transformers", "trl_sft": "trl"}  # and what each imports

# Runs an example as `__main__`. At its first step, prints the parameters that get a gradient from the geometric loss.
REPORT_GRADIENTS = """
import runpy, sys
import torch, gasp_fast, toy
plain_loss, plain_model, models = gasp_fast.gasp_loss, toy.tiny_model, []
def tiny_model(folder):
    backbone, model = plain_model(folder)
    models.append(model)
    return backbone, model
def gasp_loss(embeddings, matches, **options):
    out = plain_loss(embeddings, matches, **options)
    if len(models) == 1:
        names, parameters = zip(*models[0].named_parameters())
        gradients = torch.autograd.grad(out.loss, parameters, retain_graph=True, allow_unused=True)
        for name, gradient in zip(names, gradients):
            if gradient is not None and gradient.abs().max() > 0:
                print("reached", name)
        models.append(None)
    return out
gasp_fast.gasp_loss, toy.tiny_model = gasp_loss, tiny_model
runpy.run_path(sys.argv[1], run_name="__main__")
"""


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


@pytest.mark.parametrize("name", TRAINERS)
def test_a_reader_adds_at_most_fifteen_lines(name):
    script = EXAMPLES / f"{name}.py"
    added = added_lines(script)
    assert 5 <= len(added) <= 15, "\n".join(added)
    outside = [line for line in script.read_text().splitlines() if line not in added and "---" not in line]
    code = "\n".join(outside).split('"""')[2]
    for word in ("gasp_loss", "CorrespondenceHead", "LayerCapture", "Matches"):
        assert word not in code, f"{script.name} uses {word} outside the marks"


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_the_example_trains(name):
    pytest.importorskip(TRAINERS[name])
    done = run("-c", REPORT_GRADIENTS, str(EXAMPLES / f"{name}.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    reached = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("reached ")]
    for part in ("visual.patch_embed", "visual.merger", "language_model.layers.0.self_attn.q_proj", "gasp_heads.3"):
        assert any(part in parameter for parameter in reached), f"the geometric loss does not reach {part}: {reached}"

    lines = [line for line in done.stdout.splitlines() if line.strip() and not line.startswith("reached ")]
    head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["step", "loss"])
    names = lines[head].split()
    rows = [dict(zip(names, map(float, line.split()), strict=True)) for line in lines[head + 1 :]]
    assert len(rows) >= 4
    first, last = rows[0], rows[-1]
    assert last["loss"] < 0.6 * first["loss"]
    assert last["corr"] < first["corr"] - 0.5  # more than its variation from step to step
    assert last["PCK@2"] > first["PCK@2"] + 0.05

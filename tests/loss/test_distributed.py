"""The loss is right under DDP and ZeRO-1/2/3. Two real processes over gloo, on the CPU.

Every step is plain SGD. AdamW divides by the gradient's own size and would forgive a gradient that is too large by
the number of ranks; SGD shows it.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.runs import launch

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("distributed_steps.py")
# The ranks and the single process do the same fp32 arithmetic. Half of g0 plus half of g1 is half of their sum to the
# last bit, and no bit of difference was measured; but a library may fuse or reorder the update, which moves a parameter
# by a unit or two in its last place a step. 8 units are allowed after three steps.
TOLERANCE = 8 * torch.finfo(torch.float32).eps
TIMEOUT = 240  # seconds; a hang ends here


def load_script():
    spec = importlib.util.spec_from_file_location("distributed_steps", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["distributed_steps"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


steps = load_script()
SCHEMES = ("ddp", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module", params=SCHEMES)
def launched(request, tmp_path_factory):
    """(scheme, folder with every rank's parameters, what was printed)."""
    if request.param != "ddp":
        pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp(request.param)
    process = launch(steps.RANKS, SCRIPT, request.param, out)
    try:
        printed, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its ranks; one that is killed would leave them behind
        printed = f"no end after {TIMEOUT} s\n{process.communicate(timeout=90)[0]}"
    return request.param, out, printed


@pytest.mark.parametrize("case", steps.CASES, ids=lambda case: case.name)
def test_ranks_arrive_where_one_process_arrives_on_the_mean_gradient(launched, case):
    scheme, out, printed = launched
    start = dict(steps.Model(case).named_parameters())
    expected = steps.in_one_process(case)
    for rank in range(steps.RANKS):
        written = out / steps.result_name(case, rank)
        assert written.exists(), f"rank {rank} under {scheme} wrote nothing:\n{printed[-6000:]}"
        parameters = torch.load(written)
        assert parameters.keys() == expected.keys()
        for name, truth in expected.items():
            size = truth.abs().max()
            assert (truth - start[name]).abs().max() > 1000 * TOLERANCE * size, (
                f"{name} hardly moved: nothing is tested"
            )
            error = float((parameters[name].reshape(truth.shape) - truth).abs().max() / size)
            assert error <= TOLERANCE, f"{name} on rank {rank} under {scheme} is off by {error:.1e}"

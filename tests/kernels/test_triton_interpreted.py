"""Runs the promises in `interpreted/` under Triton's interpreter, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"

pytest.importorskip("triton")


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("promises", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_promises_hold_in_the_interpreter(promises: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / promises)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout[-10_000:], done.stderr[-10_000:])
    assert done.returncode == 0

"""Runs the promises in `interpreted/` under Triton's interpreter, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"

pytest.importorskip("triton")

# Python keeps the frames of calls in pieces of 16 KB. Where the calls of a long test cross the end of a piece, each of
# them maps and unmaps memory, which took half of the time of `test_loss.py`. Below a frame as large as this one, a
# piece has room for all.
PROGRAM = """
import sys, pytest
def main():
    return pytest.main(sys.argv[1:])
main.__code__ = main.__code__.replace(co_stacksize=70_000)
sys.exit(main())
"""


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("promises", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_promises_hold_in_the_interpreter(promises: str) -> None:
    command = [sys.executable, "-c", PROGRAM, "-q", "-p", "no:cacheprovider", str(FOLDER / promises)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout[-10_000:], done.stderr[-10_000:])
    assert done.returncode == 0

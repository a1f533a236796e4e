"""The host's part of a layer does not become slower.

The target is 80 times a product of 1 x 1 matrices; it is not reached yet: 87 to 90 were measured on one processor. The
bound is a third above that, because other processors have another ratio and other tests run beside this one. It guards
against new tensors, views and launches in the path of a layer (each costs 1 to 4 products).

Runs in a process of its own, because a driver that starts nothing takes the place of the GPU's. Noise makes the ratio
worse, so the bound is met if one of three tries meets it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "host_time_report.py"
MOST = 120  # times one product of 1 x 1 matrices
TRIES = 3


def ratio() -> float:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[0])["ratio"]


@pytest.mark.alone
@pytest.mark.slow
def test_one_layer_costs_the_host_about_ninety_small_products() -> None:
    seen = []
    for _ in range(TRIES):
        seen.append(ratio())
        if seen[-1] <= MOST:
            return
    pytest.fail(f"one layer costs the host at most {MOST} products of 1 x 1; measured {seen}")

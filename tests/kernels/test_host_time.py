"""The host's part of a layer does not become slower.

The target is 80 times a product of 1 x 1 matrices; it is not reached yet: 87 to 90 were measured. The bound is 15 %
above that, so it guards against new tensors, views and launches in the path of a layer (each costs 1 to 4 products).

Runs in a process of its own, because a driver that starts nothing takes the place of the GPU's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "host_time_report.py"
MOST = 103  # times one product of 1 x 1 matrices


@pytest.mark.slow
def test_one_layer_costs_the_host_about_ninety_small_products() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    report = json.loads(done.stdout.splitlines()[0])
    assert report["layer_us"] <= MOST * report["product_us"], report

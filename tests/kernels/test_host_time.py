"""The host's part of a layer, and of a part of a layer, does not become slower.

A layer may cost 80 times a product of 1 x 1 matrices: 47 to 50 were measured, and 91 to 100 for the first call with
some matches, which nothing was computed for. 37 to 43 were measured for a part of a layer, and 7 for one that repeats
that of an earlier layer. A launch of a later call whose columns are cut takes 10, with the products beside it, and took
60 where that call did not repeat an earlier one. The other bounds are above that, because other processors have other
ratios. They guard against new tensors, views and launches in the path of a layer (each costs 1 to 4 products).

Runs in a process of its own, because a driver that starts nothing takes the place of the GPU's. Noise makes the ratios
worse, so the bounds are met if one of three tries meets them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "host_time_report.py"
# times one product of 1 x 1
MOST = {"layer_ratio": 80, "first_ratio": 115, "part_ratio": 55, "later_ratio": 15, "cut_ratio": 20}
TRIES = 3


def measured() -> dict[str, float]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    report = json.loads(done.stdout.splitlines()[0])
    return {name: report[name] for name in MOST}


@pytest.mark.alone
@pytest.mark.slow
def test_a_layer_and_a_part_cost_the_host_few_small_products() -> None:
    seen = []
    for _ in range(TRIES):
        seen.append(measured())
        if all(seen[-1][name] <= most for name, most in MOST.items()):
            return
    pytest.fail(f"the host needs more than {MOST} products of 1 x 1: {seen}")

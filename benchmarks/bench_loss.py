"""The loss under pytest-benchmark: `pytest benchmarks/bench_loss.py --benchmark-group-by=param:workload`.

For interleaved rounds and a table of ratios to the bare products, run `gasp-fast bench`.
"""

import pytest
import torch

from gasp_fast.benchmarking.measure import checked, forward_and_backward, forward_pass
from gasp_fast.benchmarking.variants import VARIANTS, floor
from gasp_fast.benchmarking.workloads import CPU_SET, GPU_SET, WORKLOADS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = GPU_SET if DEVICE.type == "cuda" else CPU_SET


@pytest.fixture(params=NAMES)
def workload(request):
    return WORKLOADS[request.param]


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("products", ["one", "three"])
def test_floor(benchmark, workload, products):
    run = floor(workload.build(DEVICE))[products == "three"]
    benchmark(lambda: (run(), synchronize()))


@pytest.mark.parametrize("work", [forward_pass, forward_and_backward], ids=["forward", "both"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_loss(benchmark, workload, variant, work):
    row = checked(variant, workload, DEVICE)
    if row.note:
        pytest.skip(row.note)  # not available, or wrong
    problem = workload.build(DEVICE)
    benchmark(lambda: (work(variant.loss, problem), synchronize()))

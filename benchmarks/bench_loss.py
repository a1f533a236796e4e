"""The loss under pytest-benchmark: `pytest benchmarks/bench_loss.py --benchmark-group-by=param:workload`.

For a table of ratios to the floor, with interleaved rounds and peers, use `gasp-fast bench`.
"""

import pytest
import torch

from gasp_fast.benchmarking.measure import TOLERANCE, judged
from gasp_fast.benchmarking.variants import VARIANTS, floor
from gasp_fast.benchmarking.workloads import CPU_SET, GPU_SET, WORKLOADS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = GPU_SET if DEVICE.type == "cuda" else CPU_SET


@pytest.fixture(params=NAMES)
def workload(request):
    return WORKLOADS[request.param]


def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("products", ["one", "three"])
def test_floor(benchmark, workload, products):
    run = floor(workload.build(DEVICE))[products == "three"]
    benchmark(lambda: (run(), wait()))


@pytest.mark.parametrize("what", ["forward", "both"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_loss(benchmark, workload, variant, what):
    row = judged(variant, workload, DEVICE)
    if row.note:
        pytest.skip(row.note)  # not here, or wrong: then its time means nothing
    assert row.error <= TOLERANCE[workload.dtype]
    problem = workload.build(DEVICE)

    def forward():
        with torch.no_grad():
            variant.loss(problem.embeddings, problem.matches)
        wait()

    def both():
        variant.loss(problem.embeddings.detach().requires_grad_(), problem.matches).backward()
        wait()

    benchmark(forward if what == "forward" else both)

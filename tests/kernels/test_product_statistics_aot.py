"""The forward pass that stores no similarities compiles for Hopper as it is launched: tensor cores, no spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "product_statistics_aot_report.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["bfloat16,3584", "float16,3584", "float32,3584", "bfloat16,4096", "bfloat16,256", "float32,256"]
)
def test_the_product_compiles_for_hopper_without_spills(case: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), case], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    products = [report for report in reports if report["kernel"] == "product_statistics"]
    assert len(products) == 7
    for report in products:
        assert report["spill_bytes"] == 0, report
        assert report["shared"] <= 227 << 10, report
        assert report["wgmma"] > 0, report
        assert report["async_copies"] > 0, report  # embeddings are fetched ahead
        if report["rows"] == 64:  # two programs share a multiprocessor
            assert 2 * report["shared"] <= 227 << 10 and 2 * 32 * report["warps"] * report["registers"] <= 65536, report

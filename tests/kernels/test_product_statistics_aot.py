"""The forward pass that stores no similarities compiles for Hopper as it is launched: tensor cores, no spills."""

from pathlib import Path
from typing import Any

import pytest
from support.ahead_of_time import reports_by_case

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "product_statistics_aot_report.py"


CASES = ("bfloat16,3584", "float16,3584", "float32,3584", "bfloat16,4096", "bfloat16,256", "float32,256")


@pytest.fixture(scope="module")
def reports_of() -> dict[str, list[dict[str, Any]]]:
    """By case, from one process: each would import torch and Triton anew."""
    return reports_by_case(SCRIPT, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_product_compiles_for_hopper_without_spills(reports_of: dict[str, list[dict[str, Any]]], case: str) -> None:
    reports = reports_of[case]
    print(reports)
    products = [report for report in reports if report["kernel"] == "product_statistics"]
    assert len(products) == 7
    for report in products:
        assert report["spill_bytes"] == 0, report
        assert report["shared"] <= 227 << 10, report
        assert report["wgmma"] > 0, report
        assert report["async_copies"] > 0, report  # embeddings are fetched ahead
        if report["rows"] == 64:  # two programs share a multiprocessor
            assert 2 * report["shared"] <= 227 << 10 and 2 * 32 * report["warps"] * report["registers"] <= 65536, report

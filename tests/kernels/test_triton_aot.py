"""Every row kernel compiles for Hopper as it is launched, does not spill, and costs few instructions."""

from pathlib import Path
from typing import Any

import pytest
from support.ahead_of_time import reports_by_case

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "triton_aot_report.py"
PASSES = {"frame_statistics", "similarity_gradient"}  # over all similarities
KERNELS = PASSES | {"inverse_norms", "loss_terms", "add_rows", "gather_rows", "project_gradient"}
KERNELS |= {"add_transposed", "gather_columns", "place_rows", "sums_of_pieces", "sums_of_layers", "terms_of_points"}
SINGLE = {"terms_of_points"}  # twelve corners of one point: 168 registers leave three programs of four warps
# Instructions for each similarity, by how many of its numbers are loaded at once. Both passes take 12 with four; at
# 18 arithmetic takes as long as the memory of an H200: 132 x 128 lanes at 1.7 GHz, 4 bytes read for each. With frames
# that begin anywhere the gradient of two rows has more than that of four, but is faster (rows_triton).
MOST = {4: 14, 2: 18, 1: 22}
CASES = (  # element type, width, tokens of a frame
    "bfloat16,3584,256", "float16,1000,256", "float32,40,256",
    "bfloat16,16384,256", "bfloat16,64,646", "bfloat16,64,75",
)  # fmt: skip


@pytest.fixture(scope="module")
def reports_of() -> dict[str, list[dict[str, Any]]]:
    """By case, from one process: what cases have in common is compiled once."""
    return reports_by_case(SCRIPT, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_hopper_without_spills(reports_of: dict[str, list[dict[str, Any]]], case: str) -> None:
    reports = reports_of[case]
    print(reports)
    assert {report["kernel"] for report in reports} == KERNELS
    for report in reports:
        assert report["spill_bytes"] == 0, report
        assert report["registers"] <= (168 if report["kernel"] in SINGLE else 128), report
        if report["kernel"] in PASSES:
            assert report["instructions_per_element"] <= MOST[report["align"]], report

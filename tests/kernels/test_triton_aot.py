"""Every Triton kernel compiles for Hopper as it is launched and does not spill; the streaming ones use wgmma."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "triton_aot_report.py"
STREAMING = {"statistics", "row_gradient", "token_gradient"}
ALL = {
    "wide": {"inverse_norms", "frame_statistics", "loss_terms", "similarity_gradient", "project_gradient"},
    "narrow": STREAMING | {"inverse_norms", "match_similarities", "loss_terms", "finish"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["wide,bfloat16,3584", "narrow,bfloat16,256", "narrow,bfloat16,128", "narrow,float16,256", "narrow,float32,128"],
)
def test_kernels_compile_for_hopper_without_spills(case: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), case], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    print(done.stdout)
    assert {report["kernel"] for report in reports} == ALL[case.split(",")[0]]
    for report in reports:
        assert report["spill_bytes"] == 0, report
        assert report["shared"] <= 227 << 10, report
        if report["kernel"] in STREAMING:
            assert report["wgmma"] > 0, report
            assert report["async_copies"] > 0, report  # streamed tiles are fetched ahead

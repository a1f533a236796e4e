"""The roofline reproduces what was measured, and predicts from what the engine really launches."""

import contextlib
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from gasp_fast.benchmarking.workloads import WORKLOADS
from gasp_fast.kernels.triton_launch import INTERPRETED

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import roofline  # noqa: E402
import roofline_model as model  # noqa: E402
import roofline_past as past  # noqa: E402
import roofline_product as product  # noqa: E402
from roofline_trace import Launch, Trace  # noqa: E402


@pytest.fixture(scope="module")
def fit() -> model.Fit:
    return model.fitted()


def _roofline(*arguments: str) -> str:
    """Output of the script, in this process: its calls share the kernels that they compile."""
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("Triton compiles nothing in its interpreter")
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", ["roofline.py", *arguments])
        try:
            roofline.main()
        except FileNotFoundError as error:
            if "cuobjdump" not in str(error):
                raise
            pytest.skip("this build of Triton has no disassembler")
    return output.getvalue()


@pytest.fixture(scope="module")
def predictions() -> list[dict]:
    return json.loads(_roofline("--workload", "w3", "--workspace", "128", "256", "--json"))["predictions"]


@pytest.mark.parametrize(
    ("group", "largest_rms"), [("products", 0.06), ("row kernels", 0.1), ("torch kernels", 0.11), ("pauses", 0.27)]
)
def test_the_formulas_are_as_close_to_the_measurements_as_the_documentation_says(fit, group, largest_rms):
    assert fit.rms(group) < largest_rms


def test_the_constants_are_those_of_a_possible_device(fit):
    constants = fit.constants
    assert 700 < constants.product.teraflops < 990  # the peak of the tensor cores
    assert 1.3 < constants.row.gigahertz < 1.99  # the highest clock
    assert constants.product.bandwidth <= 1 and constants.product.norm >= 1


@pytest.mark.parametrize("name", ["w1", "w3"])
def test_an_earlier_design_is_reproduced_as_a_whole(fit, name):
    checks = {run: check for run, check in past.compared(fit.constants).items() if run.startswith(name)}
    assert len(checks) == 4
    for run, check in checks.items():
        assert abs(check["error"]) < 0.12, run


def test_the_earlier_block_sizes_are_those_that_were_measured():
    assert past.past_blocks("w1", 112) == (1, 988)
    assert past.past_blocks("w3", 112) == (1, 1152)
    assert past.past_blocks("w5", 112) == (1, 147)


def test_more_rows_of_a_token_gradient_are_never_slower_by_number(fit):
    times = [
        model.product_time(fit.constants.product, model.H200, 13824, 3584, rows, 4, accumulate=True) / rows
        for rows in (512, 1152, 2304, 6912)
    ]
    assert times == sorted(times, reverse=True)


def test_less_bandwidth_takes_longer(fit):
    shape = 13824, 3584, 1152, 4
    fast, slow = (model.product_time(fit.constants.product, device, *shape) for device in (model.H200, model.H100))
    assert slow > fast


def test_an_unknown_kernel_is_an_error(fit):
    with pytest.raises(ValueError, match="unheard_of"):
        roofline.time_of(Launch("unheard_of"), 0.0, model.H200, fit.constants, roofline.Case(backward=True))


@pytest.mark.parametrize("backward", [True, False])
def test_a_trace_without_the_products_of_the_loss_is_an_error(fit, backward):
    case = roofline.Case(backward=backward)
    with pytest.raises(ValueError, match="fewer than the loss needs"):
        roofline.predict(WORKLOADS["w3"], model.H200, 256, case, fit.constants, Trace())


def test_the_work_of_a_program_is_counted_from_its_tables():
    tables = product.Tables(
        programs=np.array([[0, 128, 0, 2], [0, 128, 1, 2]]),
        blocks=np.array([[0, 256, 0, 2], [256, 400, 1, 2]]),
        parts=np.array([[0, 100, 0, 0], [100, 400, 1, 1]]),
    )
    # Pieces of 32 columns: 4 of the first part and 5 of the second in the first block, 5 in the second block.
    assert tables.counts(pieces=8, columns=256).tolist() == [[2, 3, 14, 2], [1, 1, 5, 1]]


@pytest.mark.slow
def test_every_prediction_is_finite_and_above_the_floor(predictions):
    assert len(predictions) == 2 * (2 + 2 + 1)  # devices; workspaces of two passes, one kernel
    for prediction in predictions:
        assert math.isfinite(prediction["ratio"]) and 1 < prediction["ratio"] < 10, prediction
        assert prediction["milliseconds"] >= prediction["host"]


@pytest.mark.slow
def test_the_recorded_products_are_those_of_the_loss(predictions):
    load = WORKLOADS["w3"]
    forward = load.gemm_flops // 3
    folded = 2 * forward - forward * load.anchors // load.tokens  # both gradients
    for prediction in predictions:
        assert prediction["product_flops"] == forward + folded * prediction["backward"]


@pytest.mark.slow
def test_row_kernels_are_part_of_every_gradient(predictions):
    for prediction in predictions:
        if prediction["backward"]:
            assert {"frame_statistics", "similarity_gradient", "project_gradient"} <= prediction["shares"].keys()


@pytest.mark.slow
def test_a_forward_pass_is_predicted_both_ways(predictions):
    for prediction in predictions:
        in_one_kernel = prediction["fused"] and not prediction["backward"]
        assert ("product_statistics" in prediction["shares"]) == in_one_kernel
        assert ("products" in prediction["shares"]) != in_one_kernel
        if in_one_kernel:
            assert prediction["shares"]["product_statistics"] > prediction["floor"]


@pytest.mark.slow
def test_gradients_are_scaled_only_if_the_upstream_is_not_one(predictions):
    text = _roofline("--workload", "w3", "--workspace", "256", "--upstream", "2", "--json")
    scaled = json.loads(text)["predictions"][0]
    load = WORKLOADS["w3"]
    assert (scaled["workload"], scaled["device"], scaled["upstream"]) == ("w3", "H200", 2.0)
    moving = 1e3 * 4 * load.layers * load.tokens * load.width / model.H200.bandwidth  # read and written, milliseconds
    assert moving < scaled["shares"]["scale"] < 2 * moving
    for prediction in predictions:
        if prediction["backward"]:
            assert prediction["shares"]["scale"] < 0.2 * moving


@pytest.mark.slow
def test_the_tables_name_targets_and_say_that_they_predict():
    text = _roofline("--workload", "w2", "--workspace", "256")
    assert text.count("PREDICTED") == 3 and "1.80" in text and "rms" in text and "upstream 1 " in text

"""`gasp-fast bench` on a problem of a few kilobytes."""

import json

import pytest
import torch

from gasp_fast.benchmarking.measure import TOLERANCE, checked, run_workload
from gasp_fast.benchmarking.report import save
from gasp_fast.benchmarking.variants import VARIANTS, Variant, dense_infonce, ours
from gasp_fast.benchmarking.workloads import WORKLOADS
from gasp_fast.cli import main as gasp_fast

CPU = torch.device("cpu")
TINY = WORKLOADS["tiny"]


@pytest.mark.parametrize("name", ["ours", "dense eager"])
def test_a_right_variant_is_timed(name):
    row = checked(next(variant for variant in VARIANTS if variant.name == name), TINY, CPU)
    assert row.note == "" and row.error <= TOLERANCE[TINY.dtype]


@pytest.mark.parametrize(
    "loss",
    [lambda e, m: 1.01 * ours(e, m), lambda e, m: ours(e, m).detach() + 0 * e.sum(), dense_infonce],
    ids=["wrong loss", "wrong gradient", "another loss"],
)
def test_a_wrong_variant_is_not_timed(loss):
    row = checked(Variant("wrong", "full", loss, unavailable=lambda device: ""), TINY, CPU)
    assert row.note.startswith("refused: wrong by")


def test_a_variant_that_fails_is_reported_with_its_error():
    def loss(embeddings, matches):
        raise RuntimeError("no kernel image")

    row = checked(Variant("failing", "full", loss, unavailable=lambda device: ""), TINY, CPU)
    assert row.note == "fails: RuntimeError: no kernel image"


def test_the_report_holds_medians_and_ratios_to_the_bare_products(tmp_path):
    result = run_workload(TINY, CPU, rounds=3, only=["ours"])
    text, plot = save([result], CPU, tmp_path)
    workload = json.loads(text.read_text())["workloads"][0]
    (variant,) = workload["variants"]
    assert variant["both_ms"]["p50"] == sorted(result.rows[0].both)[1]
    assert variant["both_ratio"] == variant["both_ms"]["p50"] / workload["three_products_ms"]["p50"]
    assert variant["forward_ratio"] == variant["forward_ms"]["p50"] / workload["one_product_ms"]["p50"]
    assert plot.stat().st_size > 0


@pytest.mark.parametrize("device", ["bogus", "meta", "cuda:99", "cpu:-1", "xla"])
def test_a_device_that_is_not_here_is_one_line(device, capsys):
    assert gasp_fast(["bench", "--workload", "tiny", "--rounds", "1", "--device", device]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gasp-fast bench: device = '{device}' cannot be used here: ")

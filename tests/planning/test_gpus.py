"""A device is found by the name it reports; one that is not listed is measured."""

from __future__ import annotations

import pytest
import torch

from gasp_fast.planning.gpus import GPUS, find_gpu, peak_flops


@pytest.mark.parametrize(
    ("name", "listed"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"),
     ("NVIDIA B200", "b200"), ("NVIDIA A10G", None), ("NVIDIA H100 PCIe", None), ("NVIDIA GB200", None)],
)  # fmt: skip
def test_a_data_sheet_is_found_by_the_name_of_its_device(name: str, listed: str | None) -> None:
    assert find_gpu(name) == (GPUS[listed] if listed else None)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA GB200", 2.5e15),
     ("NVIDIA B200", 2.25e15), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A10G", 125e12), ("NVIDIA L40S", 362e12),
     ("NVIDIA GeForce RTX 4090", 165e12), ("Tesla V100-SXM2-32GB", 125e12)],
)  # fmt: skip
def test_the_peak_of_a_listed_gpu_is_that_of_its_vendor(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak_flops.cache_clear()
    assert peak_flops(torch.device("cuda")) == peak
    peak_flops.cache_clear()


def test_a_cpu_is_measured() -> None:
    assert 1e8 < peak_flops(torch.device("cpu")) < 1e14

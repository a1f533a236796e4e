"""Data sheets of GPUs, and the peak rate of the device at hand."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class GPU:
    """Dense peaks (FLOPs a second) and bandwidths (bytes a second) from the vendor's data sheet."""

    memory: float  # bytes
    bf16: float
    tf32: float
    fp32: float
    bandwidth: float  # of its memory
    link: float  # to the other GPUs of its node, one way
    network: float = 8 * 50e9  # out of a node of eight, one way: 400 Gbit/s for each GPU


GPUS = {
    "a100": GPU(memory=80e9, bf16=312e12, tf32=156e12, fp32=19.5e12, bandwidth=2.04e12, link=300e9, network=200e9),
    "b200": GPU(memory=180e9, bf16=2250e12, tf32=1125e12, fp32=75e12, bandwidth=7.7e12, link=900e9),
    "h100": GPU(memory=80e9, bf16=989e12, tf32=495e12, fp32=67e12, bandwidth=3.35e12, link=450e9),
    "h200": GPU(memory=141e9, bf16=989e12, tf32=495e12, fp32=67e12, bandwidth=4.8e12, link=450e9),
}
# Dense bf16 peaks of GPUs that cannot be planned for: all that MFU needs.
OTHER_PEAKS = {
    "gb200": 2.5e15, "h100 pcie": 756e12, "l40s": 362e12, "rtx 4090": 165e12, "a10": 125e12, "v100": 125e12,
}  # fmt: skip


def find_gpu(device_name: str) -> GPU | None:
    """The data sheet of a device by the name it reports; None if it is not in `GPUS`."""
    return GPUS.get(_listed(device_name))


def _listed(device_name: str) -> str:
    """The longest listed name that occurs in the device's own ("h100 pcie" before "h100"); empty if there is none."""
    return max((name for name in (*GPUS, *OTHER_PEAKS) if name in device_name.lower()), key=len, default="")


def device_memory(device: torch.device) -> float:
    """Bytes of a CUDA device that this process can have: those of its data sheet, unless others hold some."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    at_hand = float(free + torch.cuda.memory_reserved(device))
    known = find_gpu(torch.cuda.get_device_properties(device).name)
    return min(at_hand, known.memory) if known else at_hand


@lru_cache
def peak_flops(device: torch.device) -> float:
    """Peak FLOPs a second, bf16. A CPU (fp32), or a GPU that is not listed, is measured in one large product."""
    import torch

    if device.type == "cuda":
        listed = _listed(torch.cuda.get_device_name(device))
        if listed:
            return GPUS[listed].bf16 if listed in GPUS else OTHER_PEAKS[listed]
    dtype, size = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 768)
    square = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        (square @ square)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best

"""Promises of the Triton kernels: kept on a GPU, or by Triton's interpreter on a CPU.

The interpreter must be chosen before Triton is first imported and would then hold for the whole process. So in an
ordinary run without a GPU this folder collects nothing, and `../test_triton_interpreted.py` runs it in a process of
its own.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"

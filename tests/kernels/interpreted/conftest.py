"""Promises of the Triton kernels: run on a GPU, or by Triton's interpreter on a CPU.

The interpreter must be chosen before Triton is first imported and then holds for the whole process. So in an ordinary
run without a GPU this folder collects nothing, and `../test_triton_interpreted.py` runs it in a process of its own.
"""

import os
from collections.abc import Iterator
from importlib import import_module
from types import FunctionType

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_A_CPU = ["test_loss.py", "test_product_statistics.py", "test_rows.py"]  # tensors of a CPU
collect_ignore_glob = [] if INTERPRETED else ON_A_CPU if torch.cuda.is_available() else ["test_*.py"]


class Lasting:
    """Of a replacement that is never taken back."""

    def restore(self) -> None:
        pass


@pytest.fixture(scope="session", autouse=INTERPRETED)
def language_is_replaced_once() -> Iterator[None]:
    """At each launch, and at each call of a function in a kernel, the interpreter replaces all of `triton.language`
    that the function sees, and puts it back after the launch. That takes longer than the kernels. Here it stays."""
    interpreter = import_module("triton.runtime.interpreter")
    replace, seen = interpreter._patch_lang, set()

    def replace_once(function: FunctionType) -> Lasting:
        module = function.__module__
        if module not in seen:
            seen.add(module)
            replace(function)
        return Lasting()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills new memory with NaN, so that a test finds elements which a kernel does not write."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        memory = empty(*args, **kwargs)
        return memory.fill_(float("nan") if memory.is_floating_point() else -(2**40))

    monkeypatch.setattr(torch, "empty", poisoned)

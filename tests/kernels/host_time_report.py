"""Times the host's part of a call with one layer of 16 frames, without a GPU.

Kernels are compiled for sm_90, but a driver that starts nothing takes the place of the GPU's, and each matrix product
is one of 1 x 1. Other operations of PyTorch run on the CPU. So tensors are small, 144 rows and 256 tokens: at 2304 rows
and 4096 tokens the same calls would take 25 microseconds more, for the arithmetic of `index_select` and for memory that
the operating system maps, and on a GPU the host does neither. The number of blocks, parts, launches, products and
allocations depends on neither size here. Prints a JSON object; with an argument, also where the time goes.
"""

import cProfile
import json
import pstats
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
import triton.compiler.compiler as compiler
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gasp_fast.kernels import rows_triton
from gasp_fast.kernels.chunk import MatchTerms, Problem, TermDefinition, TermWeights
from gasp_fast.kernels.chunked import ChunkedEngine, Gradients
from gasp_fast.kernels.index import MatchIndex
from gasp_fast.kernels.products import Products

ROWS, FRAMES, PER_FRAME, WIDTH, MATCHES = 144, 16, 16, 16, 1250
SMALL = torch.zeros(1, 1)
started = 0


class NoDriver:
    """Answers what Triton needs to know of a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def start_nothing(*arguments: object) -> None:
    global started
    started += 1


def load_nothing(kernel: compiler.CompiledKernel) -> None:
    kernel.module = kernel.function = 1
    kernel._run = start_nothing


def small_product(*arguments: Tensor, **options: object) -> None:
    """In the place of a product."""
    torch.mm(SMALL, SMALL, out=SMALL)


def one_layer() -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    tokens = FRAMES * PER_FRAME
    rows = torch.randperm(tokens, generator=generator)[:ROWS]
    anchor = rows[torch.randint(ROWS, (MATCHES,), generator=generator)]
    anchor[:ROWS] = rows  # each is a row
    target = torch.randint(tokens - PER_FRAME, (MATCHES,), generator=generator)
    target += PER_FRAME * (target >= anchor // PER_FRAME * PER_FRAME)  # in another frame
    index = MatchIndex.build(
        frame_offsets=torch.arange(FRAMES + 1) * PER_FRAME,
        sequence_offsets=torch.tensor([0, FRAMES]),
        anchor=anchor,
        target=target,
        target_depth=torch.ones(MATCHES),
        countable=torch.ones(MATCHES, dtype=torch.bool),
        patch_depth=torch.ones(tokens),
        known=torch.ones(tokens, dtype=torch.bool),
        weight=None,
    )
    embeddings = torch.randn(1, tokens, WIDTH, generator=generator)
    problem = Problem(embeddings, embeddings, index.rows, torch.tensor(0.07), index.values, index.known, True)
    weights = TermWeights(*(torch.full((1, 1), 1e-4).expand(1, MATCHES) for _ in range(2)))
    terms = MatchTerms.empty(1, MATCHES, embeddings.device)
    gradient = torch.empty_like(embeddings)
    engine = ChunkedEngine(operations=rows_triton, workspace_bytes=1 << 30)
    definition, gradients = TermDefinition("sequence", "negatives", 1e-6), Gradients(gradient, gradient, False)
    return lambda: engine.terms_and_gradients(problem, index, weights, terms, definition, gradients)


def median_us(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * median(times)


if __name__ == "__main__":
    torch.set_num_threads(1)
    driver.set_active(NoDriver())  # type: ignore[arg-type]
    compiler.CompiledKernel._init_handles = load_nothing
    Products.product = Products.similarity = Products.row_gradient = Products.token_gradient = small_product  # type: ignore
    call = one_layer()
    call()
    started = 0
    call()
    launches = started
    product = median_us(lambda: torch.mm(SMALL, SMALL), 2000)
    layer = min(median_us(call, 60) for _ in range(3))
    ratio = round(layer / product, 1)
    print(json.dumps({"layer_us": layer, "product_us": product, "ratio": ratio, "launches": launches}))
    if len(sys.argv) > 1:
        with cProfile.Profile() as profile:
            for _ in range(200):
                call()
        pstats.Stats(profile).sort_stats(sys.argv[1]).print_stats(45)

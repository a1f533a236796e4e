"""Times the host's part of the Triton backend, without a GPU.

Kernels are compiled for sm_90, but a driver that starts nothing takes the place of the GPU's, and each matrix product
is one of 1 x 1. Other operations of PyTorch run on the CPU. So tensors are small, 144 rows and 256 tokens: at 2304 rows
and 4096 tokens the same calls would take 25 microseconds more, for the arithmetic of `index_select` and for memory that
the operating system maps, and on a GPU the host does neither. The number of blocks, parts, launches, products and
allocations depends on neither size here.

| figure     | what is timed                                                                                 |
| ---------- | --------------------------------------------------------------------------------------------- |
| `first_us` | the first call with some matches: one layer of 16 frames, whose rows are one block in one part  |
| `layer_us` | a later call with the same matches, which repeats a recording                                 |
| `part_us`  | each part of a call with 28 layers of bf16, whose rows are one block in four parts            |
| `later_us` | the same, where later layers repeat the recording of the first                                |
| `cut_us`   | each launch of a later call whose columns are cut, with the products beside it                   |
| `call_us`  | `gasp_loss` with one layer, forward and backward                                              |

Each `..._ratio` is a time divided by that of one product of 1 x 1 matrices. Prints a JSON object;
with an argument, also where the time goes.
"""

import cProfile
import json
import pstats
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import triton.compiler.compiler as compiler
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import gasp_fast
from gasp_fast.kernels import chunked, engines, rows_triton, scaling
from gasp_fast.kernels.blocks import Blocks, Sizes, blocks_for
from gasp_fast.kernels.chunk import MatchTerms, Problem, TermDefinition, TermWeights
from gasp_fast.kernels.chunked import ChunkedEngine, Gradients
from gasp_fast.kernels.products import Products
from gasp_fast.kernels.replay import recorded

ROWS, FRAMES, PER_FRAME, WIDTH, MATCHES = 144, 16, 16, 16, 1250
LAYERS, PARTS = 28, 4  # of `part_us`
LARGE, SMALLER = 1 << 30, 4000  # bytes of workspace; the second one cuts columns
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


def blocks_in_parts(sizes: Sizes, workspace: int) -> Blocks:
    """Blocks of one layer; those of a call with several layers have several parts."""
    blocks = blocks_for(sizes, workspace)
    return blocks if sizes.layers == 1 else replace(blocks, part=blocks.rows // PARTS)


def some_matches() -> gasp_fast.Matches:
    generator = torch.Generator().manual_seed(0)
    tokens = FRAMES * PER_FRAME
    rows = torch.randperm(tokens, generator=generator)[:ROWS]
    anchor = rows[torch.randint(ROWS, (MATCHES,), generator=generator)]
    anchor[:ROWS] = rows  # each is a row
    target = torch.randint(tokens - PER_FRAME, (MATCHES,), generator=generator)
    target += PER_FRAME * (target >= anchor // PER_FRAME * PER_FRAME)  # in another frame
    return gasp_fast.Matches(
        frame_offsets=torch.arange(FRAMES + 1) * PER_FRAME,
        anchor=anchor,
        target=target,
        target_depth=torch.ones(MATCHES),
        patch_depth=torch.ones(tokens),
    )


def engine_call(
    matches: gasp_fast.Matches, embeddings: Tensor, replays: bool = False, workspace: int = LARGE
) -> Callable[[], object]:
    """Both terms and the gradients of all layers."""
    index, layers = matches.index, len(embeddings)
    problem = Problem(embeddings, embeddings, index.rows, torch.tensor(0.07), index.values, index.known, True)
    weights = TermWeights(*(torch.full((layers, 1), 1e-4).expand(layers, MATCHES) for _ in range(2)))
    terms = MatchTerms.empty(layers, MATCHES, embeddings.device)
    gradient = torch.empty_like(embeddings)
    engine = ChunkedEngine(operations=rows_triton, workspace_bytes=workspace, replays=replays)
    definition, gradients = TermDefinition("sequence", "negatives", 1e-6), Gradients(gradient, gradient, False)
    return lambda: engine.terms_and_gradients(problem, index, weights, terms, definition, gradients)


def whole_call(matches: gasp_fast.Matches, embeddings: Tensor) -> Callable[[], object]:
    """The loss and its gradient."""
    leaf = embeddings.clone().requires_grad_()
    return lambda: gasp_fast.gasp_loss(leaf, matches, backend="triton", workspace=1024).loss.backward()


def least_us(call: Callable[[], object], repeats: int) -> float:
    """Processor time of a call: other processes do not count. The least of 20 measurements of so many calls each."""
    times = []
    for _ in range(20):
        start = time.thread_time()
        for _ in range(repeats):
            call()
        times.append(time.thread_time() - start)
    return 1e6 * min(times) / repeats


PRODUCTS = {t: Products(t, converts=False, wide_result=t != torch.float32) for t in (torch.float32, torch.bfloat16)}


def products_of_a_gpu(embeddings: Tensor) -> Products:
    return PRODUCTS[embeddings.dtype]


if __name__ == "__main__":
    torch.set_num_threads(1)
    driver.set_active(NoDriver())  # type: ignore[arg-type]
    compiler.CompiledKernel._init_handles = load_nothing
    Products.product = small_product  # type: ignore
    Products.similarity = Products.row_gradient = Products.token_gradient = recorded(small_product)  # type: ignore
    Products.of = staticmethod(products_of_a_gpu)  # type: ignore[method-assign]
    chunked.blocks_for = blocks_in_parts
    engines.interpreted, scaling.INTERPRETED = lambda: True, True  # tensors of the CPU count as those of a GPU
    matches, embeddings = some_matches(), torch.randn(LAYERS, FRAMES * PER_FRAME, WIDTH)
    first = engine_call(matches, embeddings[:1].clone())
    one_layer = engine_call(matches, embeddings[:1].clone(), replays=True)
    layers = engine_call(matches, embeddings.bfloat16())
    repeated = engine_call(matches, embeddings.bfloat16(), replays=True)
    cut = engine_call(matches, embeddings[:1].bfloat16(), replays=True, workspace=SMALLER)
    loss = whole_call(matches, embeddings[0])
    for call in (first, layers, repeated, *[one_layer, cut, loss] * 2):  # the second call records, later ones repeat
        call()
    started = 0
    one_layer()
    launches, started = started, 0
    cut()
    cut_launches = started
    product = least_us(lambda: torch.mm(SMALL, SMALL), 1000)
    times = {
        "layer": least_us(one_layer, 20),
        "first": least_us(first, 20),
        "part": least_us(layers, 1) / (LAYERS * PARTS),
        "cut": least_us(cut, 1) / cut_launches,
        "call": least_us(loss, 10),
    }
    times["later"] = (least_us(repeated, 1) - least_us(layers, 1) / LAYERS) / ((LAYERS - 1) * PARTS)
    report = {f"{name}_us": time for name, time in times.items()}
    report |= {f"{name}_ratio": time / product for name, time in times.items()}
    report |= {"product_us": product, "launches": launches, "cut_launches": cut_launches}
    print(json.dumps({name: round(value, 2) for name, value in report.items()}))
    if len(sys.argv) > 1:
        for call, repeats in ((first, 200), (one_layer, 200), (layers, 5), (loss, 200)):
            with cProfile.Profile(time.thread_time) as profile:
                for _ in range(repeats):
                    call()
            pstats.Stats(profile).sort_stats(sys.argv[1]).print_stats(45)

"""The CUDA kernel, as far as a machine without a GPU can test it: it compiles for Hopper without spills, and its
arithmetic, run on the host with one thread for a block, is that of the reference."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.problems import random_problem, relative_error

import gasp_fast
from gasp_fast.kernels import rows_cpp, rows_cuda
from gasp_fast.kernels.chunked import ChunkedEngine
from gasp_fast.kernels.engines import ENGINES
from gasp_fast.loss.naive import naive_loss

SOURCE = Path(__file__).parents[2] / "csrc" / "fused_rows.cu"

HOST = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#define __device__
#define __global__ static
#define __launch_bounds__(x)
#define CUDART_INF_F INFINITY
#define __expf expf
#define __logf logf
struct Index { int64_t x = 0, y = 0; };
static Index threadIdx, blockIdx;
struct dim3 { unsigned x, y; dim3(unsigned x, unsigned y) : x(x), y(y) {} };
using cudaError_t = int; using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaFuncAttributeMaxDynamicSharedMemorySize = 1 };
template <class F> int cudaFuncSetAttribute(F, int, int) { return 0; }
static int cudaGetLastError() { return 0; }
static void __syncthreads() {} static void __syncwarp() {}
static float __shfl_xor_sync(unsigned, float x, int) { return x; }
static int __shfl_xor_sync(unsigned, int x, int) { return x; }
template <class T> T min(T a, T b) { return a < b ? a : b; }
struct __nv_bfloat16 { uint16_t bits; };
static __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t u; memcpy(&u, &x, 4); return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
using __half = _Float16;
static __half __float2half_rn(float x) { return __half(x); }
static std::vector<unsigned char> block_memory;
template <class K, class... A> void run_grid(K kernel, dim3 grid, size_t bytes, A... arguments) {
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      block_memory.assign(bytes, 0xff);  // NaN: shows what the kernel reads before it writes
      kernel(arguments...);
    }
}
"""


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """The kernel with blocks of one thread: every loop over lanes and warps becomes the whole loop."""
    text = re.sub(r"#include <cuda[^\n]*|#include <math_constants.h>|#include <cstdint>", "", SOURCE.read_text())
    for old, new in [
        ("constexpr int WARP = 32;", "constexpr int WARP = 1;"),
        ("constexpr int WARPS = 8;", "constexpr int WARPS = 1;"),
        ("extern __shared__ __align__(16) unsigned char shared[];", "unsigned char* shared = block_memory.data();"),
        ("fused_rows<E><<<grid, WARP * WARPS, bytes, stream>>>(", "run_grid(fused_rows<E>, grid, bytes, "),
    ]:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    folder = tmp_path_factory.mktemp("host")
    (folder / "rows.cpp").write_text(HOST + text)
    command = ["g++", "-O1", "-std=c++17", "-w", "-shared", "-fPIC", "-o", folder / "rows.so", folder / "rows.cpp"]
    subprocess.run(command, check=True)
    return rows_cuda.library(folder / "rows.so")


@pytest.mark.parametrize("negatives", ["sequence", "frame"])
@pytest.mark.parametrize("temperature", [0.07, 0.005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_arithmetic_is_that_of_the_reference(on_host, monkeypatch, negatives, temperature, dtype):
    problem = random_problem(
        3, [[30, 7, 1, 22], [18, 25, 9]], width=3 if temperature < 0.01 else 24, matches=80, holes=0.7, planted=3.0
    )
    embeddings = problem.embeddings.to(dtype)
    passes = []

    def fused(*arguments):
        passes.append(rows_cuda.fused_pass(*arguments))
        return passes[-1]

    monkeypatch.setattr(rows_cuda, "library", lambda: on_host)
    engine = ChunkedEngine(operations=rows_cpp, workspace_bytes=20_000, fused_pass=fused)
    truth = embeddings.double().requires_grad_()
    naive = naive_loss(truth, problem.matches, temperature, negatives)
    naive.loss.backward()
    reference = gasp_fast.gasp_loss(
        embeddings.double(), problem.matches, temperature, negatives, backend="torch", return_metrics=True
    )
    monkeypatch.setitem(ENGINES, "cpp", lambda embeddings: engine)
    found = embeddings.clone().requires_grad_()
    out = gasp_fast.gasp_loss(found, problem.matches, temperature, negatives, backend="cpp", return_metrics=True)
    out.loss.backward()
    assert passes and all(passes)
    tolerance = (1e-5 if dtype == torch.float32 else 1e-2) * max(1, 0.07 / temperature)
    assert relative_error(out.loss, naive.loss) < tolerance
    assert relative_error(out.depth_per_layer, reference.depth_per_layer) < tolerance
    assert relative_error(found.grad, truth.grad) < tolerance
    assert torch.allclose(out.metrics.accuracy, reference.metrics.accuracy.float())
    assert torch.allclose(out.metrics.confidence.double(), reference.metrics.confidence.double(), atol=1e-4)


def test_a_row_that_does_not_fit_goes_through_the_separate_row_operations(on_host, monkeypatch):
    monkeypatch.setattr(rows_cuda, "library", lambda: on_host)
    monkeypatch.setattr(rows_cuda, "SHARED_BYTES", 100)
    problem = random_problem(3, [[30, 7]])
    engine = ChunkedEngine(operations=rows_cpp, workspace_bytes=1 << 20, fused_pass=rows_cuda.fused_pass)
    monkeypatch.setitem(ENGINES, "cpp", lambda embeddings: engine)
    out = gasp_fast.gasp_loss(problem.embeddings.float(), problem.matches, backend="cpp")
    truth = gasp_fast.gasp_loss(problem.embeddings, problem.matches, backend="torch")
    assert relative_error(out.loss, truth.loss) < 1e-5


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_compiles_for_hopper_without_spills(tmp_path):
    command = ["nvcc", "-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v"]
    done = subprocess.run([*command, "-o", tmp_path / "rows.cubin", SOURCE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(spills) == len(registers) == 3  # float32, bfloat16, float16
    assert set(spills) == {("0", "0")}
    assert max(registers) <= 64  # four blocks of 256 threads fill a multiprocessor's registers

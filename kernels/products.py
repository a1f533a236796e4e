"""The three matrix products of a chunk, each by the fastest library for this device and type.

Their results are float32 for every input type, because further computation starts from them.

| device, input          | products run as                                                              |
| ---------------------- | ---------------------------------------------------------------------------- |
| any, float32           | float32 (or TF32, where the user allowed it)                                 |
| CUDA, bf16 or fp16     | that type, float32 results (`out_dtype`); fp16 takes normalised embeddings   |
| CPU with AMX, bf16     | bf16; similarities through MKL's bf16 x bf16 -> float32 product              |
| CPU otherwise, 16 bits | float32, blocks of tokens converted on the way: several times faster than   |
|                        | the emulated 16-bit product, and more exact                                  |
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .blocks import Sizes
from .index import SequenceSpan
from .replay import recorded

# On a CPU; with half of the tokens anchors, folding gains 8 % at a width of 256 and costs 6 % at 64. On a GPU `blocks`
# compares both.
LEAST_FOLDED_WIDTH = 128
CONVERTED_BYTES = 4 << 20  # workspace for a block of tokens that is converted to float32


@dataclass(frozen=True)
class Products:
    """The three products for one kind of input; `element` is the type of anchors and `X`."""

    element: torch.dtype
    converts: bool  # tokens are converted to `element`, block by block
    wide_result: bool  # a 16-bit product of torch can return float32
    multiprocessors: int = 0  # of the GPU; 0: a CPU

    @property
    def normalised(self) -> bool:
        """Whether the products take normalised embeddings: `X` of raw ones would leave the range of float16."""
        return self.element == torch.float16

    def sizes(self, layers: int, sequence: SequenceSpan, width: int, backward: bool, foldable: bool = False) -> Sizes:
        """What the blocks of this sequence depend on."""
        element = self.element.itemsize
        foldable = foldable and (self.multiprocessors > 0 or width >= LEAST_FOLDED_WIDTH)
        return Sizes(
            layers, sequence.row_count, sequence.token_count, width, element, backward, self.multiprocessors,
            frames=sequence.frame_count, wide=self.element == torch.float32 and not self.converts, foldable=foldable,
        )  # fmt: skip

    @staticmethod
    def of(embeddings: Tensor) -> Products:
        dtype = embeddings.dtype
        if embeddings.is_cuda:
            return _products_of_a_gpu(dtype, embeddings.device)
        if dtype == torch.float32 or (dtype == torch.bfloat16 and has_amx()):
            return Products(dtype, converts=False, wide_result=False)
        return Products(torch.float32, converts=True, wide_result=False)

    @recorded
    def similarity(self, anchors: Tensor, tokens: Tensor, out: Tensor) -> None:
        """`out = anchors tokens^T`: [G, R, D], [G, n, D] -> float32 [G, R, n]."""
        if self.converts:
            for block in self._blocks(tokens):
                torch.bmm(anchors, tokens[:, block].to(self.element).mT, out=out[:, :, block])
        elif self.element == torch.bfloat16 and not anchors.is_cuda:
            _mkl_bf16_product(anchors[0], tokens[0], out[0])
        else:
            self.product(anchors, tokens.mT, out, accumulate=False)

    @recorded
    def row_gradient(self, x: Tensor, tokens: Tensor, out: Tensor, accumulate: bool) -> None:
        """`out (+)= x tokens`: [G, R, n], [G, n, D] -> float32 [G, R, D]."""
        if self.converts:
            for block in self._blocks(tokens):
                later = accumulate or block.start > 0
                _float_product(x[:, :, block], tokens[:, block].to(self.element), out, later)
        else:
            self.product(x, tokens, out, accumulate)

    @recorded
    def token_gradient(self, x: Tensor, anchors: Tensor, out: Tensor, accumulate: bool) -> None:
        """`out (+)= x^T anchors`: [G, R, n], [G, R, D] -> float32 [G, n, D]."""
        self.product(x.mT, anchors, out, accumulate)

    def product(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
        """`out (+)= a b` for operands in `element`, float32 [G, ., .]."""
        if self.element == torch.float32:
            _float_product(a, b, out, accumulate)
        elif self.wide_result and not accumulate:
            torch.bmm(a, b, torch.float32, out=out)
        elif self.wide_result:
            torch.baddbmm(out, a, b, torch.float32, out=out)
        else:
            rounded = torch.bmm(a, b)
            out.add_(rounded) if accumulate else out.copy_(rounded)

    def _blocks(self, tokens: Tensor) -> list[slice]:
        size = max(16, CONVERTED_BYTES // (4 * tokens.shape[-1] * tokens.shape[0]))
        return [slice(start, start + size) for start in range(0, tokens.shape[1], size)]


def _float_product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    if a.shape[0] == 1:  # one layer: libraries tune the plain product best
        a, b, out = a[0], b[0], out[0]
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    else:
        torch.baddbmm(out, a, b, out=out) if accumulate else torch.bmm(a, b, out=out)


@functools.cache
def _products_of_a_gpu(dtype: torch.dtype, device: torch.device) -> Products:
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return Products(dtype, converts=False, wide_result=dtype != torch.float32, multiprocessors=multiprocessors)


@functools.cache
def has_amx() -> bool:
    """Whether bf16 products run on this CPU's matrix unit, and MKL offers them with a float32 result."""
    return torch.cpu._is_amx_tile_supported() and mkl_bf16_function() is not None


@functools.cache
def mkl_bf16_function() -> Any:
    """MKL's bf16 x bf16 -> float32 product, for which torch has no operator; None where torch does not contain MKL."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    size, scale, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    function.restype = None
    function.argtypes = [size] * 6 + [scale, pointer, size, pointer, size, scale, pointer, size]
    return function


def _mkl_bf16_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a b^T` for bf16 [R, D], contiguous, and [n, D], float32 [R, n]."""
    function = mkl_bf16_function()
    assert function is not None
    if b.stride(1) != 1 or b.stride(0) < b.shape[1]:  # MKL takes rows of adjacent numbers, one after another
        b = b.contiguous()
    row_major, plain, transposed = 101, 111, 112
    function(
        row_major, plain, transposed, a.shape[0], b.shape[0], a.shape[1],
        1.0, a.data_ptr(), a.stride(0), b.data_ptr(), max(b.stride(0), b.shape[1]), 0.0, out.data_ptr(), out.stride(0),
    )  # fmt: skip

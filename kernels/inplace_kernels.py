# mypy: disallow-untyped-defs=False
"""Rotary embedding and SwiGLU in Triton, in place: each reads and writes its numbers once.

Both compute in float32 and round once. They have no gradient, because they overwrite what it would need. PyTorch's own
operations take several passes instead, with fp32 copies for rotary embedding.
"""

from __future__ import annotations

from torch import Tensor

from .triton_launch import INTERPRETED, Tile, cdiv, kernel, launch, power_of_two, tl
from .vector_kernels import in_rows, load_rows

# Of rotary embedding: a row is one head of one token. At 40 numbers a half, padded to 64, a thread has 16 of each.
HEADS_A_PROGRAM = 32
# Of SwiGLU: 2048 numbers of two bytes are two 16-byte loads of each factor for each of 128 threads.
GATE_TILE = Tile(rows=1, columns=2048, warps=4)


@kernel("heads", direct=True)
def rotate_heads(
    heads, token_stride: tl.int64, cos, cos_stride: tl.int64, sin, sin_stride: tl.int64, rows,
    HEADS: tl.constexpr, HALF: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_ROWS` of the `rows` pairs of a token and one of its `HEADS` heads, which lie together."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token, head = row // HEADS, row % HEADS
    column = tl.arange(0, BLOCK_COLUMNS)
    mask = (row < rows)[:, None] & (column < HALF)[None, :]
    line = (token * token_stride + head * (2 * HALF))[:, None]
    c = load_rows(cos, (token * cos_stride)[:, None], column, 1, mask, True, ALIGN)
    s = load_rows(sin, (token * sin_stride)[:, None], column, 1, mask, True, ALIGN)
    first = load_rows(heads, line, column, 1, mask, True, ALIGN)
    second = load_rows(heads, line + HALF, column, 1, mask, True, ALIGN)
    out = heads.dtype.element_ty
    tl.store(in_rows(heads, line, column, ALIGN), (first * c - second * s).to(out), mask=mask)
    tl.store(in_rows(heads, line + HALF, column, ALIGN), (second * c + first * s).to(out), mask=mask)


@kernel("gate", direct=True)
def swiglu(
    gate, up, count: tl.int64,
    ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_COLUMNS` numbers."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (column < count // ALIGN * ALIGN)[None, :]
    at = in_rows(gate, 0, column, ALIGN)
    g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(in_rows(up, 0, column, ALIGN), mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (g * tl.sigmoid(g) * u).to(gate.dtype.element_ty), mask=mask)


def usable(*tensors: Tensor) -> bool:
    """Whether these kernels can run on `tensors` and may overwrite them: nothing differentiates through them."""
    return tl is not None and all((tensor.is_cuda or INTERPRETED) and not tensor.requires_grad for tensor in tensors)


def rotate_in_place(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate queries and keys of contiguous `qkv [S, 3, H, d]` by `cos` and `sin [S, d]`, which repeat their half."""
    tokens, _, heads, width = qkv.shape
    rows, half = tokens * 2 * heads, width // 2
    tile = Tile(rows=HEADS_A_PROGRAM, columns=power_of_two(half), warps=4)
    launch(
        rotate_heads, (cdiv(rows, tile.rows),), tile,
        qkv, qkv.stride(0), cos, cos.stride(0), sin, sin.stride(0), rows,
        form=(qkv.dtype, cos.dtype, sin.dtype),
        HEADS=2 * heads, HALF=half, ALIGN=_alignment(half | cos.stride(0) | sin.stride(0), qkv, cos, sin),
    )  # fmt: skip


def swiglu_in_place(gate: Tensor, up: Tensor) -> None:
    """`gate <- silu(gate) * up`: contiguous tensors of one shape and type."""
    count = gate.numel()
    launch(
        swiglu, (cdiv(count, GATE_TILE.columns),), GATE_TILE,
        gate, up, count,
        form=(gate.dtype, up.dtype),
        ALIGN=_alignment(count, gate, up),
    )  # fmt: skip


def _alignment(steps: int, *tensors: Tensor) -> int:
    """How many numbers are loaded at once: a power of two that divides `steps` and all addresses, at most 16 bytes."""
    bits = steps
    for tensor in tensors:
        size = tensor.element_size()
        bits |= tensor.data_ptr() // size
    return min(bits & -bits, 16 // tensors[0].element_size())

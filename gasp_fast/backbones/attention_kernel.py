"""The name of the attention kernel that a run uses."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import AttentionShape

# Part of the name of the operation that torch records for backward -> the kernel. The first that occurs is meant.
SDPA_KERNELS = {
    "CudnnAttention": "cuDNN",
    "FlashAttentionForCpu": "CPU",
    "FlashAttention": "torch's FlashAttention",
    "EfficientAttention": "memory-efficient",
}


def attention_kernel(attention: str, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> str:
    """In words: an attention implementation, as transformers names it, and under SDPA the kernel that torch chooses.

    torch chooses by device, type and shape, so it is called once, as transformers does for a batch without padding.
    """
    if attention != "sdpa":
        return attention.replace("flash_attention_", "FlashAttention ")
    tokens = 256
    query = torch.zeros(1, shape.query_heads, tokens, shape.head_dim, device=device, dtype=dtype, requires_grad=True)
    key = torch.zeros(1, shape.key_heads, tokens, shape.head_dim, device=device, dtype=dtype)
    attended = F.scaled_dot_product_attention(
        query, key, key, is_causal=True, enable_gqa=shape.key_heads != shape.query_heads
    )
    name = attended.grad_fn.name() if attended.grad_fn is not None else ""
    kernel = next((kernel for part, kernel in SDPA_KERNELS.items() if part in name), "without a fused kernel")
    return f"SDPA ({kernel})"

"""Shuffles without a list: the i-th element of a permutation of `range(length)`, for any length, in constant memory.

A Feistel network is a bijection of 2^2k numbers, whatever its round function. For another length it is applied again
until the result is in range. The cycle returns to its start, which is in range, so this ends, after fewer than four
steps on average. Resuming needs only the position.
"""

from __future__ import annotations

from hashlib import blake2b

_ROUNDS = 4


def permuted(index: int, length: int, key: str) -> int:
    """Element `index` of the permutation of `range(length)` that belongs to `key`."""
    if not 0 <= index < length:
        raise ValueError(f"index = {index}: must lie in 0..{length - 1}")
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(_ROUNDS):
            digest = blake2b(f"{key}/{round_number}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half | right
        if index < length:
            return index

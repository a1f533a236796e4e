"""Keys and values of the tokens read so far: what later tokens attend to, without computing it again.

Tokens lie in the order in which they were read, patches first. A later token sees all of them, and their positions are
in the keys already.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPARE = 256  # tokens that fit after memory was enlarged, which copies it


class KeysValues:
    """Those of one layer."""

    def __init__(self) -> None:
        self.length = 0
        self._memory: Tensor | None = None  # [2, B, key heads, capacity, d]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of more tokens, twice [B, key heads, n, d]; returns those of all tokens."""
        batch, heads, count, dim = key.shape
        length = self.length + count
        memory = self._memory
        if memory is None or length > memory.shape[3]:
            memory = key.new_empty(2, batch, heads, length + SPARE, dim)
            if self._memory is not None:
                memory[:, :, :, : self.length] = self._memory[:, :, :, : self.length]
            self._memory = memory
        memory[:, :, :, self.length : length] = torch.stack([key, value])
        self.length = length
        return memory[0, :, :, :length], memory[1, :, :, :length]


class Cache:
    """Those of all layers, and the position of the next token."""

    def __init__(self, layers: int) -> None:
        self.layers = [KeysValues() for _ in range(layers)]
        self.position = 0

    @property
    def length(self) -> int:
        """The number of tokens."""
        return self.layers[0].length

    def rewind(self, length: int, position: int) -> None:
        """Forget all tokens but the first `length`, after which the next position was `position`."""
        for layer in self.layers:
            layer.length = length
        self.position = position

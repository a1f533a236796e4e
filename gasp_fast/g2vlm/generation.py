"""Text, token by token. Each token is computed once: it attends to the keys and values of those before it."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from .batch import Questions
from .cache import Cache
from .model import G2VLM


class Sampler:
    """Draws the next token from its logits."""

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        """With `temperature` 0 it is the most likely one. Only the likeliest are drawn that have `top_p` together."""
        if not temperature >= 0:
            raise ValueError(f"temperature = {temperature} is negative; give 0 for the most likely token, or more")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p = {top_p} is a share; give 0 < top_p <= 1")
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """[vocabulary] -> id."""
        if not self.temperature:
            return int(logits.argmax())
        shares, tokens = (logits.double().cpu() / self.temperature).softmax(0).sort(descending=True, stable=True)
        shares[shares.cumsum(0) - shares >= self.top_p] = 0
        return int(tokens[torch.multinomial(shares, 1, generator=self.generator)])


@torch.no_grad()
def generate(
    model: G2VLM,
    tail: Questions | Tensor,
    cache: Cache,
    max_new_tokens: int,
    ends: Collection[int] = (),
    choose: Callable[[Tensor], int] | None = None,
) -> list[int]:
    """The tokens that follow `tail`, which follows what is in the cache: one sequence. Stops before a token of `ends`.

    `choose` picks a token from logits [vocabulary]; None: the most likely one. The tokens are added to the cache, but
    for the last one where none of `ends` follows it.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}; give at least 1")
    choose = choose or Sampler()
    tokens: list[int] = []
    device = model.marks.device
    with model.autocast(device):  # one context for all tokens: weights are cast once
        while len(tokens) < max_new_tokens:
            logits = model.read(torch.tensor([tokens[-1:]], device=device) if tokens else tail, cache)
            token = choose(logits[0])
            if token in ends:
                break
            tokens.append(token)
    return tokens

"""A frozen linear layer with one adapter, `y = x W^T + s (x A^T) B^T`, in as few passes over `y` as its products take.

peft computes the adapter's output, multiplies it by `s` and adds it to the frozen layer's: two more passes over `y`,
and one over its gradient. On an H200 the multiplications alone took 6 ms of a step (1.2 s) of Qwen2.5-VL-7B and 10 of
one (0.7 s) of LLaVA-NeXT-Video-7B. Here the last product adds to `y` itself, and `s` is a factor of it. The sum is
rounded once instead of three times.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class AdaptedLinear(Linear):
    """peft's layer with its own parameters, whose A and B are `AdapterMatrix`; made by changing the class of one."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self.active_adapters
        if args or kwargs or len(names) != 1 or not self._is_plain(names[0]):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        name = names[0]
        rows = x.reshape(-1, x.shape[-1])
        total = self.base_layer(rows)  # of this call alone, so that the product may add to it
        inner = self.lora_A[name](self.lora_dropout[name](rows))
        if inner.dtype == total.dtype:
            total = self.lora_B[name](inner, total, self.scaling[name])
        else:  # without autocast: adapters in fp32 beside a model in bf16
            total = (total + self.lora_B[name](inner) * self.scaling[name]).to(total.dtype)
        return total.view(*x.shape[:-1], total.shape[-1])  # -1 would be ambiguous without tokens

    def _is_plain(self, name: str) -> bool:
        known = name in self.lora_A and name not in self.lora_variant
        return known and not self.disable_adapters and not self.merged and isinstance(self.base_layer, nn.Linear)

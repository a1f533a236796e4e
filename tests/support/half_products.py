"""Products of a GPU, on a CPU."""

import torch

from gasp_fast.kernels.products import Products
from gasp_fast.kernels.replay import recorded


class HalfProducts(Products):
    """16-bit operands, float32 sums and results."""

    def product(self, a, b, out, accumulate):
        assert a.dtype == b.dtype == self.element and self.element.itemsize == 2
        product = a.float() @ b.float()
        out.add_(product) if accumulate else out.copy_(product)

    @recorded
    def similarity(self, anchors, tokens, out):
        self.product(anchors, tokens.mT, out, False)

    @staticmethod
    def use(monkeypatch, dtype: torch.dtype, multiprocessors: int = 0) -> None:
        """For all embeddings; with `multiprocessors`, blocks are those of a GPU."""
        ways = HalfProducts(dtype, converts=False, wide_result=True, multiprocessors=multiprocessors)
        monkeypatch.setattr(Products, "of", staticmethod(lambda embeddings: ways))

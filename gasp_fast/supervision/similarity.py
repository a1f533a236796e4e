"""Mean pairwise cosine of the visual tokens' embeddings. Near 1, a layer maps all tokens to one direction.

With unit vectors `u_1 … u_n` and their sum `s`, the sum over the `n (n - 1)` ordered pairs of different tokens is
`|s|^2 - sum |u_i|^2`, so that no `n x n` product is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gasp_fast.kernels.engines import inverse_norms
from gasp_fast.kernels.rows_torch import NORM_FLOOR
from gasp_fast.loss.matches import Matches


@torch.no_grad()
def mean_cosines(embeddings: Tensor, matches: Matches) -> Tensor:
    """Of each layer of `embeddings` [G, N, D], `[G]`: the mean over pairs of tokens of one sequence.

    The means of the sequences are weighted as the correspondence term weights the sequences: by the sum of the shares
    of their matches. So the parts of an optimiser step add up to its mean.
    """
    index, dtype = matches.index, embeddings.dtype
    with torch.autocast(embeddings.device.type, enabled=False):
        scales = inverse_norms(embeddings)  # [G, N]
        squares = torch.where(scales >= 1 / NORM_FLOOR, 0.0, 1.0)  # 0 for a token without direction
        inside = index.rows.in_sequence.to(torch.float32)  # [B, N]
        added = torch.bmm((inside * scales[:, None]).to(dtype), embeddings)  # [G, B, D]
        different = added.float().square().sum(2) - squares @ inside.T  # [G, B]
        sizes = inside.sum(1)  # [B]
        pairs = (sizes * (sizes - 1)).clamp(min=1)
        return (different / pairs) @ index.sequence_shares

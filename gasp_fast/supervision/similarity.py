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
from gasp_fast.loss.metric import InMetric


@torch.no_grad()
def mean_cosines(embeddings: Tensor | InMetric, matches: Matches) -> Tensor:
    """Of each layer of `embeddings` [G, N, D], `[G]`: the mean over pairs of tokens of one sequence.

    The means of the sequences are weighted as the correspondence term weights the sequences: by the sum of the shares
    of their matches. So the parts of an optimiser step add up to its mean.
    """
    duals = metric = None
    if isinstance(embeddings, InMetric):
        (stack,), (duals,), (metric,) = embeddings.embeddings, embeddings.duals, embeddings.metrics
    else:
        stack = embeddings
    index, dtype = matches.index, stack.dtype
    with torch.autocast(stack.device.type, enabled=False):
        scales = inverse_norms(stack, duals)  # [G, N]
        some = (scales > NORM_FLOOR) & (scales < 1 / NORM_FLOOR)  # others have no direction
        inside = index.rows.in_sequence.to(torch.float32)  # [B, N]
        added = torch.bmm((inside * scales[:, None]).to(dtype), stack)  # [G, B, D]
        of_added = added if metric is None else added @ metric.to(dtype)
        different = (added.float() * of_added.float()).sum(2) - some.float() @ inside.T  # [G, B]
        sizes = inside.sum(1)  # [B]
        pairs = (sizes * (sizes - 1)).clamp(min=1)
        return (different / pairs) @ index.sequence_shares

"""Mean pairwise cosine of the visual tokens' embeddings. Near 1, a layer maps all tokens to one direction.

With unit vectors `u_1 … u_n` and their sum `s`, the sum over the `n (n - 1)` ordered pairs of different tokens is
`|s|^2 - sum |u_i|^2`, so that no `n x n` product is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gasp_fast.loss.matches import Matches


@torch.no_grad()
def mean_cosines(embeddings: Tensor, matches: Matches) -> Tensor:
    """Of each layer of `embeddings` [G, N, D], `[G]`: the mean over pairs of tokens of one sequence.

    The means of the sequences are weighted as the correspondence term weights the sequences: by the sum of the shares
    of their matches. So the parts of an optimiser step add up to its mean.
    """
    index = matches.index
    shares = index.corr_share.expand(len(matches))[index.order].float()  # [M], those of a sequence one after another
    with torch.autocast(embeddings.device.type, enabled=False):
        norms = torch.linalg.vector_norm(embeddings, dim=-1, dtype=torch.float32)  # [G, N]
        scales = 1 / norms.clamp(min=1e-12)
        squares = (norms * scales).square()  # 1, or 0 for a token without direction
        means = embeddings.new_zeros(len(embeddings), dtype=torch.float32)  # [G]
        for sequence in index.rows.sequences:
            tokens = slice(*sequence.tokens)
            first, end = (int(index.row_positions[row]) for row in sequence.rows)
            added = torch.bmm(scales[:, None, tokens].to(embeddings.dtype), embeddings[:, tokens])[:, 0]  # [G, D]
            different = added.float().square().sum(1) - squares[:, tokens].sum(1)
            pairs = max(1, sequence.token_count * (sequence.token_count - 1))
            means += different / pairs * shares[first:end].sum()
    return means

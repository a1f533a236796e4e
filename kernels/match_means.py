"""Means over matches, of every layer, in one pass: both loss terms, and how well the layer finds the targets.

By operations of torch these are thirty passes over [L, M] numbers, which for short frames take longer than the products
of the loss. Here a program reads a piece of the matches of one layer once and writes its partial sums; a second kernel
adds them. Pieces and their order depend on M alone, and there are no atomics: equal inputs give equal bits.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from .chunk import MatchTerms
from .triton_launch import Tile, cdiv, kernel, launch, power_of_two, tl

MEANS = 5  # corr, depth, accuracy, PCK, confidence
PIECE = Tile(rows=1, columns=1024, warps=4)


@kernel("partial", direct=True)
def sums_of_pieces(
    corr, depth, best, confidence, target, xy, target_xy, corr_share, depth_share, partial, matches, radius,
    ONE_CORR: tl.constexpr, ONE_DEPTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: a piece of the matches of one layer. `xy` and `target_xy` may be None. Shares are one, or one each.

    As in the definition, what is hit has the share of its match, and a share of zero times NaN is NaN.
    """
    piece, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    match = piece * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    here = match < matches
    at = layer * matches + match
    of_corr = tl.load(corr_share + (match * 0 if ONE_CORR else match), mask=here, other=0.0).to(tl.float32)
    of_depth = tl.load(depth_share + (match * 0 if ONE_DEPTH else match), mask=here, other=0.0).to(tl.float32)
    found, wanted = tl.load(best + at, mask=here, other=-1), tl.load(target + match, mask=here, other=-2)
    to = partial + (layer * tl.num_programs(0) + piece) * 5
    tl.store(to, tl.sum(tl.load(corr + at, mask=here, other=0.0) * of_corr, 0))
    tl.store(to + 1, tl.sum(tl.load(depth + at, mask=here, other=0.0) * of_depth, 0))
    tl.store(to + 2, tl.sum(tl.where(found == wanted, of_corr, 0.0), 0))
    near = 0.0
    if xy is not None:
        token = tl.maximum(found, 0)
        dx = tl.load(xy + 2 * token, mask=here, other=0).to(tl.int64)
        dy = tl.load(xy + 2 * token + 1, mask=here, other=0).to(tl.int64)
        dx -= tl.load(target_xy + 2 * match, mask=here, other=0).to(tl.int64)
        dy -= tl.load(target_xy + 2 * match + 1, mask=here, other=0).to(tl.int64)
        near = tl.sum(tl.where(dx * dx + dy * dy <= radius * radius, of_corr, 0.0), 0)
    tl.store(to + 3, near)
    tl.store(to + 4, tl.sum(tl.load(confidence + at, mask=here, other=0.0) * of_corr, 0))


@kernel("means", direct=True)
def sums_of_layers(partial, means, pieces, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """One program: a layer."""
    layer = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, pieces, BLOCK_ROWS):
        piece = start + tl.arange(0, BLOCK_ROWS)
        mask = (piece < pieces)[:, None] & (slot < 5)[None, :]
        total += tl.load(partial + (layer * pieces + piece[:, None]) * 5 + slot[None, :], mask=mask, other=0.0)
    tl.store(means + layer * 5 + slot, tl.sum(total, 0), mask=slot < 5)


def match_means(
    terms: MatchTerms,  # [L, M], dense
    target: Tensor,  # int64 [M]
    shares: tuple[Tensor, Tensor],  # of both terms: float [M], or [1] where all are equal
    xy: Tensor | None,  # int [N, 2], dense, place of each token
    target_xy: Tensor | None,  # int [M, 2], dense, of each match's target
    radius: int,  # of PCK
) -> Tensor:
    """float32 [L, 5]: means of corr and depth, accuracy, PCK (0 without places), mean confidence."""
    layers, matches = terms.corr.shape
    pieces = cdiv(matches, PIECE.columns)
    means = torch.zeros(layers, MEANS, device=target.device)
    if pieces == 0:
        return means
    partial = torch.empty(layers, pieces, MEANS, device=target.device)
    launch(
        sums_of_pieces, (pieces, layers), PIECE,
        *terms, target, xy, target_xy, *shares, partial, matches, radius,
        ONE_CORR=shares[0].numel() == 1, ONE_DEPTH=shares[1].numel() == 1,
    )  # fmt: skip
    launch(
        sums_of_layers, (layers,), Tile(rows=min(64, power_of_two(pieces)), columns=power_of_two(MEANS), warps=1),
        partial, means, pieces,
    )  # fmt: skip
    return means

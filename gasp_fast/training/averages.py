"""The loss of an optimiser step, which does not depend on how the step is divided.

    loss = lm_weight · (sum of the cross entropy of the labelled tokens) / K
           + corr_weight · (sum of corr over the units) / U + depth_weight · (sum of depth over the units) / D

`loss.average` chooses the units, each of which counts once:

    sequence    the geometric sequences, which are those with matches; each has the mean of its own matches, and U = D
                is their number
    anchor      the anchor tokens, U, in however many frames they have targets
    track       the tracks, U, in however many frames they are seen
    match       the matches, U

The matches of an anchor or of a track have equal weights with the sum 1 (`Collator.unit`). D is the sum of the weights
of the matches that have a depth. K, U and D are counted over the micro-batches of all processes.

A batch by itself gives the means over its own K, U and D. A data worker counts them (`averaged`). When the
micro-batches of a step are loaded, the processes add up their counts, and the means of each micro-batch are multiplied
by its shares of the totals (`TrainingLoop.shares_of_step`). Their sum over the step is then the loss, and the sum of
their gradients its gradient.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from gasp_fast.collator import Unit
from gasp_fast.loss.matches import Matches

Average = Literal["sequence", "anchor", "track", "match"]


def unit_of_matches(average: Average) -> Unit:
    """What the collator counts once; a sequence has the mean of its matches."""
    return "match" if average == "sequence" else average


def averaged(batch: dict[str, Any], average: Average) -> dict[str, Any]:
    """The batch with its matches averaged by `average`, and with `counts`: float64 [3], its K, U and D.

    To be called where the batch is made, on the CPU, after its `token_index` is known.
    """
    matches: Matches = batch["matches"]
    if average == "sequence":
        matches, sequences = mean_of_sequences(matches)
        units: list[Any] = [sequences, sequences]
    else:
        weight = matches.index.weight.double().expand(len(matches))[matches.index.order]  # [M], in the index's order
        units = [weight.sum(), weight[matches.index.has_depth].sum()]
    counts = torch.tensor([len(batch["token_index"].answers), *units], dtype=torch.float64)
    return {**batch, "matches": matches, "counts": counts}


def mean_of_sequences(matches: Matches) -> tuple[Matches, int]:
    """The same matches, of which the loss takes the mean of each sequence and then the mean of these; and their number.

    A sequence counts if it has matches (of a weight above 0). Its depth term is 0 if none of them has a depth.
    """
    index, sequence = matches.index, matches.sequence_of_matches()  # [M]
    has_depth = torch.empty_like(index.has_depth)
    has_depth[index.order] = index.has_depth  # by match
    weight = index.weight.double().expand(sequence.shape)
    totals = weight.new_zeros(len(index.rows.spans)).index_add(0, sequence, weight)  # [B]
    units = int((totals > 0).sum())

    def shares(of_term: Tensor) -> Tensor:
        totals = of_term.new_zeros(len(index.rows.spans)).index_add(0, sequence, of_term)
        return weight / (torch.where(totals > 0, totals, 1)[sequence] * max(1, units))

    return matches.with_shares(shares(weight), shares(weight * has_depth)), units

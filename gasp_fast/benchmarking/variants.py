"""The ways to solve a workload: ours, dense PyTorch, peers where they are installed and run, and the floor.

A variant gives a scalar to differentiate. Peers know no frames, no depth and no excluded anchor: they solve what they
can, InfoNCE of each anchor against all tokens with one target, on embeddings normalised by PyTorch. Each is judged by
the problem it solves.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gasp_fast.loss.dense import dense_terms
from gasp_fast.loss.function import gasp_loss
from gasp_fast.loss.matches import Matches

from .workloads import Problem

TEMPERATURE = 0.07
Loss = Callable[[Tensor, Matches], Tensor]  # embeddings [L, N, D] -> scalar


@dataclass(frozen=True)
class Variant:
    name: str
    solves: str  # "full" (both terms) or "infonce"
    loss: Loss
    available: Callable[[torch.device], str]  # why it cannot run there; "" if it can


def ours(embeddings: Tensor, matches: Matches) -> Tensor:
    return gasp_loss(embeddings, matches, TEMPERATURE).loss


def dense(embeddings: Tensor, matches: Matches) -> Tensor:
    """The loss as one would write it: one similarity matrix, masks, `logsumexp` and `softmax`. Equal frames only."""
    plan = matches.plan
    layers, tokens, _ = embeddings.shape
    frames, rows = plan.rows.longest, plan.rows.row_token
    unit = F.normalize(embeddings, dim=-1)
    s = unit[:, rows] @ unit.mT / TEMPERATURE  # [L, A, N]
    own = torch.arange(tokens, device=s.device) == rows[:, None]
    s = s.masked_fill(own, float("-inf"))
    corr = s.logsumexp(-1)[:, plan.row] - s[:, plan.row, plan.target]  # [L, M]
    among = s.masked_fill(~plan.known, float("-inf")).unflatten(-1, (frames, -1))  # [L, A, F, n]
    expected = (among.softmax(-1) * plan.values[:, 0].view(frames, -1)).sum(-1)
    guess = expected[:, plan.row, plan.target // (tokens // frames)]
    depth = (plan.depth - guess).abs() / (plan.depth + guess + 1e-6) * plan.counts
    return 0.3 * corr.mean() + depth.sum() / plan.depth_count / layers


_compiled: list[Loss] = []


def compiled_dense(embeddings: Tensor, matches: Matches) -> Tensor:
    if not _compiled:
        _compiled.append(torch.compile(dense, dynamic=False))
    return _compiled[0](embeddings, matches)


def dense_infonce(embeddings: Tensor, matches: Matches) -> Tensor:
    """What the peers compute, densely: their judge."""
    anchors, unit, target = _as_classification(embeddings, matches)
    losses = [F.cross_entropy((a @ u.mT).float(), target) for a, u in zip(anchors, unit, strict=True)]
    return torch.stack(losses).mean()


def cut_cross_entropy(embeddings: Tensor, matches: Matches) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    anchors, unit, target = _as_classification(embeddings, matches)
    # Its gradient filter skips what is small: another, inexact problem. Off, as for anything that is to be compared.
    losses = [linear_cross_entropy(a, u, target, filter_eps=None) for a, u in zip(anchors, unit, strict=True)]
    return torch.stack(losses).mean()


def liger(embeddings: Tensor, matches: Matches) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    anchors, unit, target = _as_classification(embeddings, matches)
    criterion = LigerFusedLinearCrossEntropyLoss()
    losses = [criterion(u, a, target) for a, u in zip(anchors, unit, strict=True)]
    return torch.stack(losses).mean()


def inf_cl(embeddings: Tensor, matches: Matches) -> Tensor:
    from inf_cl import cal_flash_loss

    anchors, unit, target = _as_classification(embeddings, matches)
    losses = [cal_flash_loss(a, u, labels=target).mean() for a, u in zip(anchors, unit, strict=True)]
    return torch.stack(losses).mean()


def judge(solves: str, embeddings: Tensor, matches: Matches) -> Tensor:
    """The float64 truth of what a variant claims to solve."""
    wide = embeddings.double()
    if solves == "infonce":
        return dense_infonce(wide, matches)
    tau = torch.tensor(TEMPERATURE, dtype=torch.float64, device=embeddings.device)
    terms = dense_terms(wide, matches.plan, tau, sequence_negatives=True, eps=1e-6)
    depth = terms.depth.sum() / matches.plan.depth_count / len(wide)
    return 0.3 * terms.corr.mean() + depth


def _as_classification(embeddings: Tensor, matches: Matches) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors over temperature [L, A, D], all tokens [L, N, D], and the first target of each anchor [A]."""
    plan = matches.plan
    unit = F.normalize(embeddings, dim=-1)
    first = plan.run_start[:: plan.rows.longest][:-1]
    return unit[:, plan.rows.row_token] / TEMPERATURE, unit, plan.target[first]


def _anywhere(device: torch.device) -> str:
    return ""


def _needs(package: str) -> Callable[[torch.device], str]:
    def why_not(device: torch.device) -> str:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        return "" if device.type == "cuda" else "runs on CUDA only"

    return why_not


VARIANTS = (
    Variant("ours", "full", ours, _anywhere),
    Variant("dense eager", "full", dense, _anywhere),
    Variant("dense compiled", "full", compiled_dense, _anywhere),
    Variant("cut-cross-entropy", "infonce", cut_cross_entropy, _needs("cut_cross_entropy")),
    Variant("liger", "infonce", liger, _needs("liger_kernel")),
    Variant("inf-cl", "infonce", inf_cl, _needs("inf_cl")),
)


def floor(problem: Problem) -> tuple[Callable[[], None], Callable[[], None]]:
    """(one product, all three products) of each layer, bare, in the type of the problem: what the library costs."""
    embeddings = problem.embeddings
    anchors = embeddings[:, problem.matches.plan.rows.row_token].contiguous()
    similarity = embeddings.new_empty(anchors.shape[1], embeddings.shape[1]).normal_()

    def one() -> None:
        for a, e in zip(anchors, embeddings, strict=True):
            a @ e.mT

    def three() -> None:
        for a, e in zip(anchors, embeddings, strict=True):
            a @ e.mT
            similarity @ e
            similarity.mT @ a

    return one, three

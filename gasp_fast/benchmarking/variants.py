"""The implementations that are timed: ours, dense PyTorch, other libraries where installed, and the floor.

A variant computes a scalar to differentiate. The other libraries have no frames, no depth and no excluded anchor: they
solve InfoNCE of each anchor against all tokens with one target, on embeddings normalised by PyTorch. Each variant is
compared with a float64 reference of the problem that it solves.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gasp_fast.loss.config import LossConfig
from gasp_fast.loss.function import gasp_loss
from gasp_fast.loss.matches import Matches
from gasp_fast.loss.naive import naive_loss

from .workloads import Problem

Loss = Callable[[Tensor, Matches], Tensor]  # embeddings [L, N, D] -> scalar


@dataclass(frozen=True)
class Variant:
    name: str
    solves: str  # "full" (both terms) or "infonce"
    loss: Loss
    unavailable: Callable[[torch.device], str]  # why it cannot run on a device; "" if it can


def ours(embeddings: Tensor, matches: Matches) -> Tensor:
    return gasp_loss(embeddings, matches).loss


def dense(embeddings: Tensor, matches: Matches) -> Tensor:
    """The loss in dense PyTorch: one similarity matrix, masks, `logsumexp` and `softmax`. Frames of one size only."""
    index = matches.index
    layers, tokens, _ = embeddings.shape
    frames, rows = index.rows.longest, index.rows.row_token
    unit = F.normalize(embeddings, dim=-1)
    s = unit[:, rows] @ unit.mT / LossConfig.temperature  # [L, A, N]
    own = torch.arange(tokens, device=s.device) == rows[:, None]
    s = s.masked_fill(own, float("-inf"))
    corr = s.logsumexp(-1)[:, index.row] - s[:, index.row, index.target]  # [L, M]
    known = s.masked_fill(index.known == 0, float("-inf")).unflatten(-1, (frames, -1))  # [L, A, F, n]
    expected = (known.softmax(-1) * index.values[:, 0].view(frames, -1)).sum(-1)  # [L, A, F]
    expected = expected[:, index.row, index.target // (tokens // frames)]  # [L, M]
    depth = (index.depth - expected).abs() / (index.depth + expected + LossConfig.eps) * index.has_depth
    return LossConfig.corr_weight * corr.mean() + depth.sum() / index.depth_total / layers


_compiled: list[Loss] = []


def compiled_dense(embeddings: Tensor, matches: Matches) -> Tensor:
    if not _compiled:
        _compiled.append(torch.compile(dense, dynamic=False))
    return _compiled[0](embeddings, matches)


def dense_infonce(embeddings: Tensor, matches: Matches) -> Tensor:
    """What the other libraries compute, in dense PyTorch: their reference."""
    return _infonce(lambda a, u, target: F.cross_entropy((a @ u.mT).float(), target), embeddings, matches)


def cut_cross_entropy(embeddings: Tensor, matches: Matches) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    # Off: its gradient filter skips small entries, which is a different, inexact problem.
    return _infonce(partial(linear_cross_entropy, filter_eps=None), embeddings, matches)


def liger(embeddings: Tensor, matches: Matches) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    criterion = LigerFusedLinearCrossEntropyLoss()
    return _infonce(lambda a, u, target: criterion(u, a, target), embeddings, matches)


def liger_sm90(embeddings: Tensor, matches: Matches) -> Tensor:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return _infonce(liger_fused_linear_cross_entropy_sm90, embeddings, matches)


def quack(embeddings: Tensor, matches: Matches) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return _infonce(chunked_linear_cross_entropy, embeddings, matches)


def inf_cl(embeddings: Tensor, matches: Matches) -> Tensor:
    from inf_cl import cal_flash_loss

    return _infonce(lambda a, u, target: cal_flash_loss(a, u, labels=target).mean(), embeddings, matches)


def naive(embeddings: Tensor, matches: Matches) -> Tensor:
    return naive_loss(embeddings, matches, LossConfig.temperature).loss


def reference(solves: str) -> Loss:
    """The definition of what a variant computes, to be evaluated in float64. Small problems only."""
    return {"full": naive, "infonce": dense_infonce}[solves]


def _infonce(layer_loss: Callable[..., Tensor], embeddings: Tensor, matches: Matches) -> Tensor:
    """Mean over layers of `layer_loss(anchors / temperature [A, D], all tokens [N, D], first target of each [A])`."""
    index = matches.index
    unit = F.normalize(embeddings, dim=-1)
    anchors = unit[:, index.rows.row_token] / LossConfig.temperature
    target = index.target[index.run_start[:: index.rows.longest][:-1]]
    return torch.stack([layer_loss(a, u, target) for a, u in zip(anchors, unit, strict=True)]).mean()


def _anywhere(device: torch.device) -> str:
    return ""


def _cuda_with(*packages: str, hopper: bool = False) -> Callable[[torch.device], str]:
    """Available where these packages are installed and there is a GPU; with `hopper`, one of compute capability 9.0."""

    def unavailable(device: torch.device) -> str:
        for package in packages:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        if device.type != "cuda":
            return "runs on CUDA only"
        if hopper and torch.cuda.get_device_capability(device) != (9, 0):
            return "runs on Hopper (sm_90) only"
        return ""

    return unavailable


VARIANTS = (
    Variant("ours", "full", ours, _anywhere),
    Variant("dense eager", "full", dense, _anywhere),
    Variant("dense compiled", "full", compiled_dense, _anywhere),
    Variant("cut-cross-entropy", "infonce", cut_cross_entropy, _cuda_with("cut_cross_entropy")),
    Variant("liger", "infonce", liger, _cuda_with("liger_kernel")),
    Variant("liger sm90", "infonce", liger_sm90, _cuda_with("liger_kernel", "cutlass", hopper=True)),
    Variant("quack", "infonce", quack, _cuda_with("quack", "cutlass", hopper=True)),
    Variant("inf-cl", "infonce", inf_cl, _cuda_with("inf_cl")),
)


def floor(problem: Problem) -> tuple[Callable[[], None], Callable[[], None]]:
    """(one, all three) matrix products of each layer, in the type of the problem, with nothing between them."""
    embeddings = problem.embeddings
    anchors = embeddings[:, problem.matches.index.rows.row_token].contiguous()
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

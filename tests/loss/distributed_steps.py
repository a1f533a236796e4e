"""One rank of a distributed run: `torchrun distributed_steps.py SCHEME OUT`, SCHEME being ddp, zero1, zero2 or zero3.

Trains a small model for a few steps on this rank's own problems, once for each case, and writes its parameters. The
test imports this file and trains the same model in one process, on the mean over the ranks.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))  # torchrun starts this file, not pytest

import torch
from support.problems import random_problem
from torch import Tensor, nn

from gasp_fast import CorrespondenceHead, GaspLoss, Matches

RANKS = 2
STEPS = 3
LEARNING_RATE = 0.5
WIDTH = 12


@dataclass(frozen=True)
class Case:
    name: str
    learnable_temperature: bool = False
    without_match: bool = False  # the last rank's batches hold no match at all
    negatives: str = "sequence"


CASES = (
    Case("fixed temperature"),
    Case("a rank without matches", without_match=True, negatives="frame"),
    Case("learnable temperature", learnable_temperature=True),
)


class Model(nn.Module):
    """Linear -> CorrespondenceHead -> gasp_loss: the structure of a supervised model, with a few hundred weights."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(WIDTH, WIDTH)
        self.head = CorrespondenceHead(WIDTH, out_size=8)
        self.loss = GaspLoss(0.2, negatives=case.negatives, learnable_temperature=case.learnable_temperature)

    def forward(self, features: Tensor, matches: Matches) -> Tensor:
        return self.loss(self.head(self.base(features)), matches).loss


def batch(case: Case, rank: int, step: int) -> tuple[Tensor, Matches]:
    """Features `[L, N, D]` and matches: other numbers, frames and lengths on every rank at every step."""
    sequences = [[5 + rank, 9, 3 + step], [7, 4 + 2 * rank]]
    count = 0 if case.without_match and rank == RANKS - 1 else 20 + 10 * rank
    problem = random_problem(100 * rank + step, sequences, width=WIDTH, matches=count)
    return problem.embeddings.float(), problem.matches


def in_one_process(case: Case) -> dict[str, Tensor]:
    """The parameters that the ranks must end with: every step follows the mean of their gradients."""
    model = Model(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(RANKS):
            (model(*batch(case, rank, step)) / RANKS).backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def under_ddp(case: Case, rank: int) -> nn.Module:
    model = Model(case)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        wrapped(*batch(case, rank, step)).backward()
        optimizer.step()
    return model


def under_zero(case: Case, rank: int, stage: int) -> nn.Module:
    import deepspeed

    model = Model(case)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "steps_per_print": 1_000_000,
    }
    if stage == 3:  # partition everything, however small
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for step in range(STEPS):
        engine.backward(engine(*batch(case, rank, step)))
        engine.step()
    return model


def result_name(case: Case, rank: int) -> str:
    return f"{case.name.replace(' ', '-')}-{rank}.pt"


def parameters(model: nn.Module, scheme: str) -> dict[str, Tensor]:
    gathered: Any = nullcontext()
    if scheme == "zero3":
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with gathered:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def main(scheme: str, out: str) -> None:
    torch.set_num_threads(1)
    if scheme == "ddp":
        torch.distributed.init_process_group("gloo")
    else:
        import deepspeed

        # DeepSpeed would compile a shared-memory collective for half a minute; gloo's own is all that is needed here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo")
    rank = torch.distributed.get_rank()
    for case in CASES:
        model = under_ddp(case, rank) if scheme == "ddp" else under_zero(case, rank, int(scheme[-1]))
        torch.save(parameters(model, scheme), Path(out) / result_name(case, rank))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""`--dry-run`: what a run would train, and what its first step takes. Writes nothing that stays."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from gasp_fast.backbones import unwrap

from .log import Bar, RunLog, summary
from .model import trained_groups

if TYPE_CHECKING:
    from .trainer import GaspTrainer

# fp32 weight, its gradient, two moments of Adam; ZeRO divides the moments, then the gradients, then the weights.
DIVIDED = {0: 0, 1: 8, 2: 12, 3: 16}


def report(trainer: GaspTrainer) -> None:
    """Print the groups and the estimate, run one step, print what it took."""
    first = trainer.processes.first
    if first:
        print(describe(trainer), flush=True)
    trainer.args.max_steps, trainer.args.save_strategy = 1, "no"
    trainer.args.set_save(strategy="no")
    with tempfile.TemporaryDirectory() as folder:
        trainer.out = Path(folder)
        trainer.run_log, trainer.bar = RunLog(trainer.out, 0), Bar(1, 0, False, Console())
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        record = json.loads(trainer.run_log.path.read_text() or "{}")
    if first:
        memory = record["peak_memory"] / 1e9
        print(f"one step: {summary(record)}")
        print(f"          {seconds:.1f} s with all that a first step prepares, at most {memory:.2f} GB a process")
        hours = seconds * trainer.steps / 3600
        print(f"the run:  {trainer.steps:,} steps, at most {hours:.1f} h at this rate (later steps are faster)")


def describe(trainer: GaspTrainer) -> str:
    """What is trained, where, and the memory of weights, gradients and optimiser."""
    settings, share, ranks = trainer.settings, trainer.share, trainer.processes.ranks
    lines = [f"{'group':<10} {'parameters':>15} {'learning rate':>14}"]
    trained = 0
    for group in trained_groups(trainer.supervised):
        rate = settings.train.learning_rate * (settings.train.head_lr_scale if group.name == "heads" else 1)
        lines.append(f"{group.name:<10} {group.count:>15,} {rate:>14g}")
        trained += group.count
    frozen = [p for p in trainer.supervised.parameters() if not p.requires_grad]
    lines.append(f"{'frozen':<10} {sum(p.numel() for p in frozen):>15,} {'-':>14}")
    held = sum(p.numel() * p.element_size() for p in frozen) / (ranks if trainer.stage == 3 else 1)
    divided = DIVIDED[trainer.stage]
    held += trained * (16 - divided + divided / ranks)
    attention = unwrap(trainer.supervised.model).config._attn_implementation
    lines.append(
        f"{ranks} process{'es' if ranks > 1 else ''}, ZeRO-{trainer.stage}, {attention} attention; a step is "
        f"{share.batch_size} sequences: {share.micro_batch_size} at once, {share.accumulation} times on each"
    )
    lines.append(f"weights, gradients, optimiser: {held / 1e9:.2f} GB a process; activations come on top")
    return "\n".join(lines)

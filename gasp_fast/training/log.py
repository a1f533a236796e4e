"""What a run tells: `log.jsonl`, a progress bar, and the numbers behind both.

Knows the outputs of a step and the clock; decides nothing. One object per logged step:

    step, loss, lm, corr, depth    means over the micro-batches of all processes since the last line; a term that no
                                   batch had, or that is not finite, is null
    corr_per_layer, depth_per_layer, pck_per_layer    [L], the same means
    lr, grad_norm                  of the adapters (or the model); before clipping
    tokens_per_s, mfu              over all processes
    peak_memory                    bytes, the largest of all processes: of the GPU, or of the process without one

Sums are kept on the device and fetched when a line is written: watching costs no wait in between.
"""

from __future__ import annotations

import json
import math
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from gasp_fast.run_folder import LOG

from .throughput import peak_flops

SECONDS_BETWEEN_LINES = 30.0  # on what is no terminal: a batch system's log


class Meter:
    """Sums over the micro-batches of this process since the last reading."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self.layers, self.device = layers, device
        self._clear()

    def _clear(self) -> None:
        # loss, batches; lm, batches with answers; batches with matches; tokens, operations; corr, depth, pck [L] each
        self.sums = torch.zeros(7 + 3 * self.layers, dtype=torch.float64, device=self.device)
        self.start = time.perf_counter()

    def add(self, outputs: dict[str, Tensor], matches: int, tokens: int, operations: float) -> None:
        answered = (outputs["answers"] > 0).double()
        head = [outputs["loss"].detach().double(), answered.new_ones(()), outputs["lm"].double() * answered, answered]
        known = answered.new_tensor([float(matches > 0), float(tokens), operations])
        layers = [outputs[name].double() * float(matches > 0) for name in ("corr", "depth", "pck") if name in outputs]
        self.sums += torch.cat([torch.stack(head), known, *layers])

    def state(self) -> list[list[float]]:
        """Of every process, what has been summed since the last line, and the seconds that took. All must call."""
        own = torch.cat([self.sums, self.sums.new_tensor([time.perf_counter() - self.start])])
        everybodys = [own]
        if dist.is_initialized() and dist.get_world_size() > 1:
            everybodys = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(everybodys, own)
        return [one.tolist() for one in everybodys]

    def restore(self, state: list[list[float]], rank: int, ranks: int) -> None:
        """Go on from `state`; where other processes wrote it, the first one takes all of it."""
        sums = torch.tensor(state, dtype=torch.float64)  # [processes, sums and seconds]
        seconds = float(sums[0, -1])
        own = sums[rank] if len(sums) == ranks else sums.sum(0) * (rank == 0)
        self.sums, self.start = own[:-1].to(self.device), time.perf_counter() - seconds

    def read(self) -> dict[str, Any]:
        """The means over all processes, and a fresh start."""
        memory = torch.tensor(float(_peak_memory(self.device)), dtype=torch.float64, device=self.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.sums)
            dist.all_reduce(memory, dist.ReduceOp.MAX)
        seconds = time.perf_counter() - self.start
        loss, batches, lm, answered, matched, tokens, operations, *layers = self.sums.tolist()
        per_layer = [
            [finite(total / matched) if matched else None for total in layers[at : at + self.layers]]
            for at in range(0, 3 * self.layers, self.layers)
        ] if self.layers else [[], [], []]  # fmt: skip
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        record = {
            "loss": finite(loss / batches) if batches else None,
            "lm": finite(lm / answered) if answered else None,
            "corr": _mean(per_layer[0]),
            "depth": _mean(per_layer[1]),
            "corr_per_layer": per_layer[0],
            "depth_per_layer": per_layer[1],
            "pck_per_layer": per_layer[2],
            "tokens_per_s": tokens / seconds,
            "mfu": operations / seconds / (ranks * peak_flops(self.device)),
            "peak_memory": int(memory.item()),
        }
        self._clear()
        return record


def finite(value: float) -> float | None:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else None


def _mean(values: list[Any]) -> float | None:
    return sum(values) / len(values) if values and None not in values else None


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class RunLog:
    """`log.jsonl` of a run. Lines of steps that a resumed run will do again are dropped first."""

    def __init__(self, folder: Path, steps_done: int) -> None:
        self.path = folder / LOG
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:  # the last line of a killed run may be half a line
                    continue
                if record["step"] <= steps_done:
                    kept.append(line)
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in kept))
        os.replace(partial, self.path)

    def write(self, record: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


class Bar:
    """Steps, the three losses, PCK, tokens per second, MFU: a line on a terminal that moves, or now and then a line."""

    def __init__(self, steps: int, done: int, shown: bool, console: Console) -> None:
        self.steps, self.console = steps, console
        self.in_lines = shown and not console.is_terminal
        self.last_line = -math.inf
        self.progress = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TimeRemainingColumn(),
            TextColumn("{task.fields[told]}"),
            console=console,
            disable=not shown or self.in_lines,
        )
        self.task = self.progress.add_task("", total=steps, completed=done, told="")
        self.progress.start()

    def update(self, step: int, record: dict[str, Any] | None = None) -> None:
        self.progress.update(self.task, completed=step)
        if record is not None:
            self.progress.update(self.task, told=summary(record))
            now = time.monotonic()
            if self.in_lines and (now - self.last_line > SECONDS_BETWEEN_LINES or step == self.steps):
                self.last_line = now
                self.console.print(f"{step}/{self.steps} {summary(record)}", highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self.progress.stop()


def summary(record: dict[str, Any]) -> str:
    """A record in a few words; PCK is that of the best layer."""
    pck = [value for value in record["pck_per_layer"] if value is not None]
    parts = [f"{name} {record[name]:.3f}" for name in ("lm", "corr", "depth") if record[name] is not None]
    parts += [f"pck {max(pck):.2f}"] if pck else []
    return " · ".join([*parts, f"{record['tokens_per_s']:,.0f} tok/s", f"mfu {record['mfu']:.0%}"])


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The record as TensorBoard and its like take it: one number a name, layers counted from 1."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            kind = name.removesuffix("_per_layer")
            flat |= {f"{kind}/layer_{n}": v for n, v in enumerate(value, 1) if v is not None}
        elif value is not None:
            flat[name] = value
    return flat

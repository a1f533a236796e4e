"""The log of a run: `log.jsonl`, the progress bar, and the sums that both are made from.

One JSON object per logged step, with GASP's terms:

    step, loss, lm, corr, depth    means over the steps since the last line, of the step's loss and its terms as
                                   `averages.py` defines them; a term that no step had, or that is not finite, is
                                   null; corr and depth are means over layers, also where the loss has their sum
    corr_per_layer, depth_per_layer, pck_per_layer    [L], the same means
    cosine_per_layer               [L], the mean cosine between the embeddings of two tokens of a sequence; near 1, all
                                   tokens have one direction
    lr                             of the adapters (or the model); heads have their own
    grad_norm                      of all trained weights, before clipping
    tokens_per_s, mfu              over all processes
    useful_share                   of the time of the slowest process in a step, what the processes compute in the mean,
                                   by the costs by which the step's sequences were dealt to them
    peak_memory                    bytes, the largest of all processes: of GPU memory, or without a GPU of the process
    data_wait                      share of the time waiting for the loader, of the process that waits longest
    device_wait                    share of the time in which the host waits for its GPU, of the process that waits
                                   least: near 0, a host is too slow; null without a GPU
    skipped                        samples since the last line that could not be used and were replaced, by kind
                                   (`skipped.py`)

and one for each evaluation while training:

    step, held_out                 `features`, `sequences`, `layers` (counted from 1); `pck`, the mean of all layers;
                                   `peak`, `moved` and `rho` of the best layer, `peak_layer`; `identity`; all three of
                                   each layer; `best`: better than all before; `seconds`, which no step's speed counts

The sums stay on the device until a line is due. Then they are copied behind the step that they belong to, and read when
the next step has been launched: the host never waits for a GPU that has nothing else to do.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich.progress
import torch
from accelerate import Accelerator
from accelerate.utils import gather
from rich.console import Console
from torch import Tensor

from gasp_fast.files import append, write_atomically
from gasp_fast.planning.gpus import peak_flops
from gasp_fast.run_folder import LOG

from . import held_out
from .curves import losses_of, read_log
from .loader import LoadedBatches
from .objective import Objective, Term
from .same_run import leaves
from .skipped import KINDS, Skipped, SkippedFile, in_numbers, join
from .summary import summarise

# Seconds, skipped samples, and the useful shares of the steps; older checkpoints have none.
HOST_SUMS = ("data_wait", "device_wait", *KINDS, "useful")
LITTLE_USEFUL = 0.9  # share of the time of several processes below which the progress bar says so
MUCH_WAITING = 0.05  # share of the time waiting for data from which on the progress bar says so
SECONDS_BETWEEN_LINES = 30.0  # where the output is not a terminal, such as a batch system's log file


class HostCopy:
    """The numbers of a tensor, copied to the host in the background. `read` waits until they are there."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.detach().to("cpu", non_blocking=True)  # into pinned memory
        self._done = None
        self.there_since = time.perf_counter()  # as far as is known
        if tensor.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record()

    @property
    def from_device(self) -> bool:
        return self._done is not None

    def read(self) -> Tensor:
        if self._done is not None:
            self._done.synchronize()
            self.there_since = time.perf_counter()
        return self._copy


class Meter:
    """Sums over the micro-batches of this process since the last log line. Losses are parts of the means of a step."""

    def __init__(self, counts: Sequence[str], terms: Sequence[Term], device: torch.device) -> None:
        """`counts`: what the entries of a step's counts are; of each, steps in which it is above 0 are counted."""
        self.counts, self.terms, self.device = counts, terms, device
        single = [term.name for term in terms if term.layers is None]
        layered = {term.name: term.layers for term in terms if term.layers is not None}
        # The order is that of `unlogged` in checkpoints. The first process counts steps.
        widths = dict.fromkeys(("loss", "steps", *single, *counts, "tokens", "flops"), 1)
        widths |= {**layered, **dict.fromkeys(HOST_SUMS, 1)}
        self.names, self.widths = tuple(widths), list(widths.values())
        self.packed = torch.zeros(sum(self.widths), dtype=torch.float64, device=device)
        self.sums = self._columns(self.packed)  # views of `packed`
        self.start = time.perf_counter()

    def _columns(self, packed: Tensor) -> dict[str, Tensor]:
        """The columns of `packed` by name: [1] each, or [L] for those of the layers."""
        return dict(zip(self.names, packed.split(self.widths), strict=True))

    def begin_step(self, totals: Tensor, useful: float) -> None:
        """Count a step, on one process. `totals` [C]: what its losses are averaged over; `useful`: its useful share."""
        self.sums["steps"] += 1
        for name, total in zip(self.counts, totals, strict=False):
            self.sums[name] += total > 0
        self.sums["useful"] += useful

    def add(self, loss: Tensor, terms: Mapping[str, Tensor], tokens: int, flops: float) -> None:
        sums = self.sums
        sums["loss"] += loss.detach()
        sums["tokens"] += tokens
        sums["flops"] += flops
        for name, value in terms.items():
            sums[name] += value

    def add_loading(self, batches: LoadedBatches) -> list[Skipped]:
        """Add the time spent waiting for the loader, and the skipped samples, which are returned."""
        seconds, skipped = batches.take()
        self.sums["data_wait"] += seconds
        for one in {one.position: one for one in reversed(skipped)}.values():  # the first of each position
            self.sums[one.kind] += 1
        return skipped

    def add_device_wait(self, seconds: float) -> None:
        self.sums["device_wait"] += seconds

    def state(self) -> list[list[float]]:
        """The sums of every process, and the seconds since the last line, `[processes][sums + 1]`. All must call."""
        return HostCopy(self._gathered(time.perf_counter() - self.start)).read().tolist()

    def _gathered(self, value: float) -> Tensor:
        """The sums of every process, and a value of each, [processes, sums + 1], in new memory on the device."""
        return gather(torch.cat([self.packed, self.packed.new_full((1,), value)])[None])

    def restore(self, state: list[list[float]], rank: int, world_size: int) -> None:
        """Go on from `state`. If it was written by another number of processes, the first one takes all sums."""
        try:
            sums = torch.tensor(state, dtype=torch.float64)  # [processes, sums + 1]
            missing = len(self.packed) + 1 - sums.shape[1]
            cosine = self.names.index("cosine") if "cosine" in self.names else 0
            layers = self.widths[cosine]
            if missing in (layers, layers + len(HOST_SUMS)):  # of an older version: no cosine, or no host sums either
                before, after = sums.tensor_split([sum(self.widths[:cosine])], dim=1)
                sums = torch.cat([before, sums.new_zeros(len(sums), missing), after], dim=1)
            sums = sums.view(max(1, len(state)), len(self.packed) + 1)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"the checkpoint's unlogged sums do not fit this run ({error})") from error
        own = sums[rank] if len(sums) == world_size else sums.sum(0) * (rank == 0)
        self.packed.copy_(own[:-1])
        if missing and self.sums["steps"] > 0:
            self.sums["cosine"].fill_(torch.nan)  # of the first line, because some of its steps did not measure it
        self.start = time.perf_counter() - float(sums[0, -1])

    def take(self) -> HostCopy:
        """The sums of all processes, for `means`; they begin anew. All processes must call."""
        taken = HostCopy(self._gathered(_peak_memory(self.device)))
        self.packed.zero_()
        return taken

    def means(self, taken: HostCopy) -> dict[str, Any]:
        """The means of sums that were taken. Speeds count the time between the ends of the logged steps."""
        gathered = taken.read()
        seconds, self.start = taken.there_since - self.start, taken.there_since
        columns, waits = self._columns(gathered[:, :-1].sum(0)), self._columns(gathered[:, :-1].T)
        steps = columns["steps"].item()
        single, layered = dict[str, Any](), dict[str, Any]()
        for term in self.terms:
            values = [_ratio(total, columns[term.counted].item()) for total in columns[term.name].tolist()]
            if term.layers is None:
                single[term.name] = values[0]
            else:
                layered[f"{term.name}_per_layer"] = values
                if term.is_loss:
                    single[term.name] = _mean(values)
        return {
            "loss": _ratio(columns["loss"].item(), steps),
            **single,
            **layered,
            "tokens_per_s": columns["tokens"].item() / seconds,
            "mfu": columns["flops"].item() / seconds / (len(gathered) * peak_flops(self.device)),
            "useful_share": _ratio(columns["useful"].item(), steps),
            "peak_memory": int(gathered[:, -1].max()),
            "data_wait": min(1.0, waits["data_wait"].max().item() / seconds),
            "device_wait": min(1.0, waits["device_wait"].min().item() / seconds) if taken.from_device else None,
            "skipped": {kind: int(columns[kind]) for kind in KINDS if columns[kind]},
        }


def finite(value: float | None) -> float | None:
    """`value`, or None if it is infinite or NaN, which JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def _ratio(total: float, count: float) -> float | None:
    return finite(total / count) if count else None


def _mean(values: list[Any]) -> float | None:
    return sum(values) / len(values) if values and None not in values else None


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class RunLog:
    """Reports a run from the first process: `log.jsonl`, the progress bar, the trackers of `run.report_to`.

    As a context manager it closes them and, if the run reached its end, draws and prints the summary.
    """

    def __init__(
        self,
        objective: Objective,
        steps: int,
        done: int,
        resume: Path | None,
        accelerator: Accelerator,
    ) -> None:
        config, self.next_command = objective.config, objective.next_command
        self.run, self.accelerator, self.first = config.run, accelerator, accelerator.is_main_process
        self.interrupted = False  # set by the loop
        name = {"name": config.run.name or config.run.out}
        accelerator.init_trackers(config.run.project, flat(asdict(config)), {"wandb": name, "trackio": name})
        if self.first:
            join(Path(config.run.out), done)
        accelerator.wait_for_everyone()
        self.skipped = SkippedFile(Path(config.run.out), accelerator.process_index, config.train.batch_size)
        if self.first:
            self.skipped.add(objective.stream.left_out)  # before the first step
            self.file = LogFile(Path(config.run.out), done)
            self.console = Console(stderr=True)
            begin = "from the beginning" if resume is None else f"resuming from {resume}"
            self.note(f"{steps:,} steps into {config.run.out}, {begin}")
            self.bar = Progress(steps, done, config.run.progress, self.console)

    def note(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.first and self.run.progress:
            self.console.print(text, highlight=False, soft_wrap=True)

    def progress(self, step: int) -> None:
        if self.first:
            self.bar.update(step)

    def write(self, record: dict[str, Any]) -> None:
        if self.first:
            self.file.write(record)
            self.bar.update(record["step"], record)
        self.accelerator.log(scalars(record), record["step"])

    def write_held_out(self, step: int, metrics: dict[str, Any]) -> None:
        """Report an evaluation, in a line of its own."""
        if self.first:
            self.file.write({"step": step, "held_out": metrics})
        self.note(f"step {step}: {held_out.in_words(metrics)}")
        self.accelerator.log(held_out.scalars(metrics), step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.first:
            self.bar.stop()
        if error is None:
            for tracker in self.accelerator.trackers:  # end_training() would end the process group, too
                tracker.finish()
            if self.first:
                join(Path(self.run.out))  # all have saved, so that no process writes
            if self.first and not self.interrupted:
                summarise(Path(self.run.out), self.console, self.run.progress, self.next_command)


class LogFile:
    """Appends to `log.jsonl`. Lines of steps after `done`, which a resumed run does again, are dropped first."""

    def __init__(self, folder: Path, done: int) -> None:
        self.path = folder / LOG
        lines = [json.dumps(record) for record in read_log(self.path) if record["step"] <= done]
        write_atomically(self.path, "".join(f"{line}\n" for line in lines).encode())

    def write(self, record: dict[str, Any]) -> None:
        append(self.path, json.dumps(record) + "\n")


class Progress:
    """Progress on stderr: one line that is updated on a terminal, otherwise a new line every half minute."""

    def __init__(self, steps: int, done: int, shown: bool, console: Console) -> None:
        self.steps, self.console = steps, console
        self.in_lines = shown and not console.is_terminal
        self.last_line = -math.inf
        self.bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            rich.progress.BarColumn(bar_width=10),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[text]}"),
            console=console,
            disable=not shown or self.in_lines,
        )
        self.task = self.bar.add_task("", total=steps, completed=done, text="")
        self.bar.start()

    def update(self, step: int, record: dict[str, Any] | None = None) -> None:
        self.bar.update(self.task, completed=step)
        if record is not None:
            self.bar.update(self.task, text=in_words(record))
            now = time.monotonic()
            if self.in_lines and (now - self.last_line > SECONDS_BETWEEN_LINES or step == self.steps):
                self.last_line = now
                self.console.print(f"{step}/{self.steps} {in_words(record)}", highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self.bar.stop()


def in_words(record: dict[str, Any]) -> str:
    """The losses, the PCK of the best layer and the speed, in 45 columns; then what is out of the ordinary."""
    pck = [value for value in record.get("pck_per_layer", ()) if value is not None]
    parts = [f"{name} {record[name]:.2f}" for name in losses_of(record) if record[name] is not None]
    parts += [f"pck {max(pck):.2f}"] if pck else []
    on_gpu = record.get("device_wait") is not None
    parts.append(f"mfu {record['mfu']:.0%}" if on_gpu else f"{record['tokens_per_s'] / 1000:.1f}k tok/s")
    if record["data_wait"] >= MUCH_WAITING:
        parts.append(f"waits for data {record['data_wait']:.0%}")
    if record["useful_share"] is not None and record["useful_share"] < LITTLE_USEFUL:
        parts.append(f"useful {record['useful_share']:.0%}")
    if record["skipped"]:
        parts.append(f"skipped {in_numbers(record['skipped'])}")
    return " ".join(parts)


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The record as trackers take it: one number a name, as in `train/corr/layer_3`; layers are counted from 1."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            kind = name.removesuffix("_per_layer")
            numbers |= {f"train/{kind}/layer_{n}": v for n, v in enumerate(value, 1) if v is not None}
        elif isinstance(value, dict):
            numbers |= {f"train/{name}/{kind}": v for kind, v in value.items()}
        elif value is not None:
            numbers[f"train/{name}"] = value
    return numbers


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration as trackers take it: one value a dotted key."""
    kept = (bool, int, float, str)
    return {key: value if isinstance(value, kept) else str(value) for key, value in leaves(tree)}

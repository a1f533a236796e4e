"""Samples that cannot be used: counted by kind, named in `skipped.jsonl`.

One JSON object per sample that was left out or replaced:

    step        that would have used it; 0: left out before the first step
    position    in the stream of samples; null before the first step
    kind        scene, sequence, video or question: what could not be used
    record      its file or folder, and its place there
    reason      in one line

Loader workers find them and put them into the batch. Each process appends those of its batches to a file of its own,
because appending to one file from several nodes loses lines. The first process joins the files when a run is resumed
and when it ends. A record is named once, however often it is drawn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gasp_fast.files import append, read_json_lines, write_atomically
from gasp_fast.run_folder import SKIPPED

Entry = dict[str, Any]  # a line of the file
STEM = Path(SKIPPED).stem
KINDS = ("scene", "sequence", "video", "question")


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be used, and why."""

    kind: str  # one of KINDS
    record: str
    reason: str
    position: int | None = None  # in the stream; None: it was left out before the first step

    def __str__(self) -> str:
        return f"{self.kind} {self.record}: {self.reason}"


def in_numbers(counts: dict[str, int]) -> str:
    """Such as "2 videos, 1 question"."""
    return ", ".join(f"{count:,} {kind}{'s' * (count != 1)}" for kind, count in counts.items() if count)


class SkippedFile:
    """Appends the skipped samples of this process. Prints the first one of each kind."""

    def __init__(self, out: Path, rank: int, batch_size: int) -> None:
        self.path = out / (f"{STEM}-{rank}.jsonl" if rank else SKIPPED)
        self.batch_size = batch_size
        self.kinds: set[str] = set()
        self.named: set[tuple[str, str]] = set()

    def add(self, skipped: Iterable[Skipped]) -> None:
        lines = []
        for one in skipped:
            step = 0 if one.position is None else one.position // self.batch_size + 1
            if step and one.kind not in self.kinds:
                self.kinds.add(one.kind)
                line = f"gasp_fast.train: step {step}: skipped {one}; all are named in {self.path}"
                print(line, file=sys.stderr, flush=True)
            entry = {"step": step, **asdict(one)}
            if _name(entry) not in self.named:
                self.named.add(_name(entry))
                lines.append(json.dumps(entry) + "\n")
        if lines:
            append(self.path, "".join(lines))


def join(out: Path, done: int | None = None) -> None:
    """Join the files of all processes. No process may write meanwhile.

    When a run is resumed after `done` steps, what it will find again is dropped: later steps, and what was left out.
    """
    pieces = sorted(out.glob(f"{STEM}-*.jsonl"))
    entries = [entry for path in (out / SKIPPED, *pieces) for entry in _read(path)]
    if done is not None:
        entries = [entry for entry in entries if 0 < entry["step"] <= done]
    entries.sort(key=lambda entry: (entry["step"], entry["position"] or 0))
    once: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        once.setdefault(_name(entry), entry)
    if once or (out / SKIPPED).exists():
        write_atomically(out / SKIPPED, "".join(json.dumps(entry) + "\n" for entry in once.values()).encode())
    for path in pieces:
        path.unlink()


def left_out(out: Path) -> dict[str, int]:
    """How many samples of each kind were left out before the first step, as far as they are named."""
    kinds = [entry["kind"] for entry in _read(out / SKIPPED) if not entry["step"]]
    return {kind: kinds.count(kind) for kind in KINDS}


def _name(entry: Entry) -> tuple[str, str]:
    return entry["kind"], entry["record"]


def _read(path: Path) -> list[Entry]:
    """The entries of a file that are whole."""

    def whole(entry: Entry) -> bool:
        position = entry.get("position", "")
        numbers = type(entry.get("step")) is int and (position is None or type(position) is int)
        return numbers and entry.get("kind") in KINDS and isinstance(entry.get("record"), str)

    return [entry for entry in read_json_lines(path) if whole(entry)]

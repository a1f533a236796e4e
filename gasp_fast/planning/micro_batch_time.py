"""Seconds that a GPU computes for a sequence or a micro-batch, and that its host needs to start the operations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from .assumptions import Assumptions
from .gpus import GPU
from .training_setup import SequenceSize, TrainingSetup
from .work import Work, operations, work_of_micro_batch, work_of_sequence


def sequence_seconds(
    setup: TrainingSetup, sequence: SequenceSize, gpu: GPU, assumptions: Assumptions
) -> dict[str, float]:
    """Seconds of one GPU on one sequence, by part."""
    return seconds_of(setup, work_of_sequence(setup, sequence), gpu, assumptions)


def seconds_of(setup: TrainingSetup, work: Iterable[Work], gpu: GPU, assumptions: Assumptions) -> dict[str, float]:
    """Seconds of one GPU on this work, by part."""
    peaks = {"bf16": gpu.bf16, "tf32": gpu.tf32, "fp32": gpu.fp32}
    own = {"heads": setup.head_precision, "geometric loss": setup.embedding_precision}
    seconds: dict[str, float] = {}
    for one in work:
        rate = peaks[own.get(one.part, setup.precision)] * getattr(assumptions, one.rate)
        moving = one.bytes / (gpu.bandwidth * getattr(assumptions, one.speed))
        took = assumptions.factors.get(one.part, 1.0) * (one.flops / rate + moving + one.seconds)
        seconds[one.part] = seconds.get(one.part, 0.0) + took
    return seconds


def host_seconds(setup: TrainingSetup, assumptions: Assumptions) -> float:
    """Seconds that the host takes to start the operations of a micro-batch."""
    return assumptions.factors.get("host", 1.0) * assumptions.operation * operations(setup)


class MicroBatchSeconds:
    """Seconds of any micro-batch. The parts of a sequence's time are computed once for each of its sizes."""

    def __init__(self, setup: TrainingSetup, gpu: GPU, assumptions: Assumptions) -> None:
        self.setup, self.gpu, self.assumptions = setup, gpu, assumptions
        token = self._parts(SequenceSize(frames=0, tokens=1, visual=0))
        self.by_pair = token.pop("attention")  # of two tokens of a sequence
        self.by_token = sum(token.values())  # decoder, adapters, norms
        self.by_label = sum(self._parts(SequenceSize(frames=0, tokens=0, visual=0, labelled=1)).values())
        self.by_micro_batch = sum(seconds_of(setup, work_of_micro_batch(setup), gpu, assumptions).values())
        self.of_host = host_seconds(setup, assumptions)
        self._unpadded: dict[SequenceSize, float] = {}

    def of(self, sizes: Sequence[SequenceSize]) -> float:
        """Of one micro-batch, whose sequences are packed or padded to the longest; 0 if there are none."""
        if not sizes:
            return 0.0
        lengths = [size.tokens for size in sizes]
        if not self.setup.packing:
            lengths = [max(lengths)] * len(lengths)
        return self.by_micro_batch + sum(map(self.padded, lengths)) + sum(map(self.unpadded, sizes))

    def padded(self, tokens: int) -> float:
        """Of the decoder, for one sequence that is padded to so many tokens."""
        return (self.by_token + self.by_pair * tokens) * tokens

    def unpadded(self, size: SequenceSize) -> float:
        """Of what does not depend on padding: the vision tower, heads and losses of one sequence."""
        key = replace(size, tokens=0, labelled=0, most_tokens=None)
        if key not in self._unpadded:
            self._unpadded[key] = sum(self._parts(key).values())
        return self._unpadded[key] + self.by_label * size.labelled

    def _parts(self, size: SequenceSize) -> dict[str, float]:
        return sequence_seconds(self.setup, size, self.gpu, self.assumptions)

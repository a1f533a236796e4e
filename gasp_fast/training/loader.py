"""The data loader of a training process: from positions in the stream to batches that are ready for a step."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from gasp_fast.backbones import Backbone
from gasp_fast.backbones.packing import pack
from gasp_fast.collator import Collator, Sample
from gasp_fast.data.errors import one_line
from gasp_fast.processes import in_time

from .averages import Average, averaged, unit_of_matches
from .signals import end_with_trainer
from .skipped import Skipped
from .sources import TrainingSample
from .stream import DataConfig, SampleStream, Share, StreamBatches

BLANK = 56  # pixels along each side of the blank frame: small, but large enough for every processor
PATIENCE = 1.0  # seconds; while a batch is awaited, the loader checks so often whether a worker has died


class SteadyCollator:
    """A `Collator` for training: its batches always have at least one frame, a `token_index`, and `counts`.

    A batch of no samples holds a blank frame, without an answer and without a match, and counts nothing.
    `token_index` is a `TokenIndex`; `counts` is what the terms of the loss are averaged over (`averages.py`). With
    `packing`, the sequences lie one after another in one row. Loader workers get it pickled.
    """

    def __init__(self, collate: Collator, average: Average = "sequence", packing: bool = False) -> None:
        self.collate, self.average, self.packing = collate, average, packing

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        if not any(len(sample.frames) for sample in samples):
            samples = [*samples, Sample(frames=[np.full((BLANK, BLANK, 3), 127, np.uint8)])]
        batch = self.collate(samples)
        batch = {**batch, "token_index": self.collate.backbone.index_tokens(batch)}
        return averaged(pack(batch) if self.packing else batch, self.average)


class ReplacingCollator:
    """A collator whose batch fails for no sample: one that cannot be encoded is replaced by another of its source.

    The batch has one more entry, `skipped`, if samples were skipped.
    """

    def __init__(self, collate: SteadyCollator, stream: SampleStream) -> None:
        self.collate, self.stream = collate, stream

    def __call__(self, samples: Sequence[TrainingSample]) -> dict[str, Any]:
        try:
            batch = self.collate(samples)
        except Exception:  # whatever it is, it must not end the run
            samples = self._replaced(samples, [])  # a sample's own fault does not depend on the others of its batch
            if self._fault(samples) is not None:
                samples = [*samples[:1], *self._replaced(samples[1:], samples[:1])]
            batch = self.collate(samples)
        skipped = [one for sample in samples for one in sample.skipped]
        return {**batch, "skipped": skipped} if skipped else batch

    def _replaced(
        self, samples: Sequence[TrainingSample], others: Sequence[TrainingSample]
    ) -> Sequence[TrainingSample]:
        """The samples, those that cannot be collated with `others` replaced."""
        usable = []
        for sample in samples:
            while (error := self._fault([*others, sample])) is not None:
                sample = self.stream.instead_of(sample, error)
            usable.append(sample)
        return usable

    def _fault(self, samples: Sequence[TrainingSample]) -> Exception | None:
        try:
            self.collate(samples)
        except Exception as error:
            return error
        return None


class LoadedBatches:
    """Iterates over a loader. Measures and limits how long it waits, and takes the skipped samples out of the batches.

    A read from a network file system may never end. A batch that takes longer than `timeout` seconds is an `OSError`.
    """

    def __init__(self, loader: DataLoader[Any], stream: SampleStream, timeout: float) -> None:
        loader.timeout = PATIENCE if loader.num_workers else 0
        self.batches: Iterator[dict[str, Any]] = iter(loader)
        self.positions = iter(loader.batch_sampler or ())  # of the samples of each batch
        self.has_workers = loader.num_workers > 0
        self.stream, self.timeout = stream, timeout
        self.seconds = 0.0  # waited since the last `take`
        self.skipped: list[Skipped] = []  # since the last `take`

    def __iter__(self) -> LoadedBatches:
        return self

    def __next__(self) -> dict[str, Any]:
        start, positions = time.perf_counter(), next(self.positions, [])
        try:
            batch = self._next_in_time()
        except TimeoutError:
            samples = ", ".join(map(self.stream.describe, positions))
            raise OSError(
                f"not read after {self.timeout:g} s, half of run.timeout: {samples}; is the file system there? If it "
                "is only slow, raise run.timeout"
            ) from None
        except Exception as error:
            if (line := _of_worker(error)) is None:
                raise
            raise OSError(line) from error
        self.seconds += time.perf_counter() - start
        self.skipped += batch.pop("skipped", ())
        return batch

    def _next_in_time(self) -> dict[str, Any]:
        """The next batch; a `TimeoutError` if there is none in time."""
        if not self.has_workers:
            return in_time(partial(next, self.batches), self.timeout)
        end = time.monotonic() + self.timeout
        while True:
            try:
                return next(self.batches)
            except RuntimeError as error:  # after `PATIENCE` seconds
                if not str(error).startswith("DataLoader timed out"):
                    raise
                if time.monotonic() >= end:
                    raise TimeoutError from error

    def __enter__(self) -> LoadedBatches:
        return self

    def __exit__(self, *_: object) -> None:
        """End the loader's workers. They do not receive the SIGTERM that torch would send to busy ones."""
        for worker in multiprocessing.active_children():
            worker.kill()
        # Not later: in a garbage collection, torch's clean-up and Python's would close the same pipes.
        self.batches = iter(())

    def take(self) -> tuple[float, list[Skipped]]:
        """The seconds and the skipped samples since the last call."""
        taken = self.seconds, self.skipped
        self.seconds, self.skipped = 0.0, []
        return taken


def _of_worker(error: Exception) -> str | None:
    """What happened in a loader worker, in one line: torch adds the worker's traceback. None: not in a worker."""
    text = str(error)
    if "Original Traceback" in text:
        return text.rstrip().rpartition("\n")[2].partition(": ")[2]
    torn = isinstance(error, ConnectionError | EOFError | FileNotFoundError)  # while it handed a tensor over
    if torn or text.startswith(("DataLoader worker", "received 0 items of ancdata")):
        return f"a loader worker was killed ({one_line(error)}); if it was for memory, lower data.workers"
    return None


def make_loader(
    config: DataConfig,
    stream: SampleStream,
    backbone: Backbone,
    share: Share,
    steps: int,
    pin_memory: bool,
    done: int = 0,
    average: Average = "sequence",
    packing: bool = False,
) -> DataLoader[Any]:
    """Loads the micro-batches of this process, from the step after `done` on."""
    collate = SteadyCollator(Collator(backbone, config.collator, unit_of_matches(average)), average, packing)
    return make_data_loader(stream, ReplacingCollator(collate, stream), share, steps, done, config.workers, pin_memory)


def make_data_loader(
    stream: Dataset[Any],
    collate: Callable[[Any], dict[str, Any]],
    share: Share,
    steps: int,
    done: int,
    workers: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    """Loads the micro-batches of this process from samples that are functions of their position."""
    return DataLoader(
        stream,
        batch_sampler=StreamBatches(share, steps, done),
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        # A fork would copy the threads and the GPU context of this process, which do not survive that.
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=end_with_trainer if workers else None,
    )

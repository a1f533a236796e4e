"""Tensors on disk through torch.distributed.checkpoint (DCP), each process writing its share.

Whole tensors are dealt to the processes by size, and every process writes its own into safetensors files of its own:

    model-00001-of-00003.safetensors …, model.safetensors.index.json    as Hugging Face divides large models

DCP's other formats hold pickles, which can execute code, so they are neither written nor read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

FILE_BYTES = 4 << 30  # of one file, at most by one tensor more: so much is copied at once while it is written
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Dealt:
    """This process's share of some tensors, and the number of the file that each tensor of all processes is in."""

    own: dict[str, Tensor]
    files: dict[str, int]


def deal(tensors: Iterable[tuple[str, Tensor]], rank: int, world_size: int, in_place: bool) -> Dealt:
    """Deal whole tensors to the processes, each to the one that has the fewest bytes so far. All must call.

    All processes must get the same names and sizes in the same order. `tensors` may be gathered while they are read:
    they are released as soon as the next one is taken. A share is copied to host memory, or, `in_place`, not copied:
    then it must be written before the next step.
    """
    own, files = dict[str, Tensor](), dict[str, int]()
    given, in_file = [0] * world_size, [0] * world_size  # bytes
    current = list(range(1, world_size + 1))  # the file that each process is filling
    for name, tensor in tensors:
        owner = given.index(min(given))
        if in_file[owner] >= FILE_BYTES:
            current[owner], in_file[owner] = max(current) + 1, 0
        given[owner] += tensor.nbytes
        in_file[owner] += tensor.nbytes
        files[name] = current[owner]
        if owner == rank:
            own[name] = (tensor if in_place else tensor.to("cpu", copy=True)).contiguous()
    return Dealt(own, files)


def write(folder: Path, dealt: Dealt, group: dist.ProcessGroup | None) -> None:
    """Write the shares of all processes of `group` into `folder`. All must call; None: this process is alone.

    When it returns on one of them, all files are complete. What kept one from writing is raised on all.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), dealt.files)
    with _plain_errors():
        dcp.save({**dealt.own}, storage_writer=writer, process_group=group, no_dist=group is None)


def shapes(folder: Path, files: str) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in the files of `folder` whose names begin with `files`."""
    stored: dict[str, Any] = _reader(folder, files).read_metadata().state_dict_metadata
    return {name: tuple(tensor.size) for name, tensor in stored.items()}


def read_into(tensors: Mapping[str, Tensor], folder: Path, files: str) -> None:
    """Copy the tensors of these names from files of `folder` whose names begin with `files`. Each must be there."""
    with _plain_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is not needed
        dcp.load(dict(tensors), storage_reader=_reader(folder, files), no_dist=True)


def _reader(folder: Path, files: str) -> dcp.HuggingFaceStorageReader:
    reader = dcp.HuggingFaceStorageReader(str(folder))
    reader.fs = _Files(files)
    return reader


class _Files(FileSystem):
    """The files whose names begin alike."""

    def __init__(self, beginning: str) -> None:
        self.beginning = beginning

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [str(file) for file in sorted(Path(path).glob(f"{self.beginning}*"))]


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise what one of the processes raised, instead of DCP's collection of tracebacks."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error

"""The folder of data: each dataset of the hub in `OWNER/NAME`, its unpacked videos in a folder named by lmms-eval.

lmms-eval runs in this folder, without a network. `datasets` reads `OWNER/NAME` there, as it would from the hub; a
dataset that it has prepared before is read from its cache. Archives of videos in `OWNER/NAME` are unpacked by lmms-eval
at the first use.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from .suites import Benchmark, Data

SNAPSHOT = "local"  # stands for a commit in the cache that `link_as_hub_cache` makes


def default_folder() -> Path:
    """Where lmms-eval itself keeps its data."""
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()


def missing(folder: Path, benchmark: Benchmark) -> str | None:
    """One line that says what is missing and where to put it; None if the data are there."""
    data = benchmark.data
    place = folder / data.repository
    if not place.is_dir() and not _prepared(folder, data.repository):
        return (
            f"{benchmark.key}: no data; put a copy of the dataset {data.repository} into {place} "
            f"(hf download --repo-type dataset {data.repository} --local-dir {place})"
        )
    if data.media and not (folder / data.media).is_dir() and not _archives(place):
        return (
            f"{benchmark.key}: no videos; put the archives of {data.repository} into {place}, or unpack them into "
            + (f"{folder / data.media}")
        )
    return None


def link_as_hub_cache(cache: Path, folder: Path, datasets: Iterable[Data]) -> None:
    """Let `snapshot_download`, which some tasks call, find the datasets on the disk."""
    shutil.rmtree(cache, ignore_errors=True)
    for repository in {data.repository for data in datasets}:
        place = folder / repository
        if place.is_dir():
            entry = cache / f"datasets--{repository.replace('/', '--')}"
            (entry / "refs").mkdir(parents=True)
            (entry / "snapshots").mkdir()
            (entry / "refs" / "main").write_text(SNAPSHOT)
            (entry / "snapshots" / SNAPSHOT).symlink_to(place.absolute(), target_is_directory=True)


def _archives(place: Path) -> bool:
    return place.is_dir() and any(path.suffix == ".zip" or ".tar" in path.name for path in place.rglob("*"))


def _prepared(folder: Path, repository: str) -> bool:
    name = repository.replace("/", "___").lower()
    cache = folder / "datasets"
    return cache.is_dir() and any(path.name.lower() == name for path in cache.iterdir())

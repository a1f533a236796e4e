"""A folder that many jobs write is used only when every shard is there, whole, and of the same settings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gasp_fast.data.annotations.inventory import take_inventory
from gasp_fast.data.annotations.parts import ranges
from gasp_fast.data.annotations.read import AnnotationReader
from gasp_fast.data.annotations.settings import AnnotationSettings
from gasp_fast.data.annotations.shard import shard_path
from gasp_fast.data.annotations.write import annotate
from gasp_fast.data.questions.from_tracks import make_vqa


@pytest.fixture
def folder(cache: AnnotationReader, tmp_path: Path) -> Path:
    """A copy of complete annotations in 9 shards, which the test may damage."""
    return shutil.copytree(cache.folder, tmp_path / "tracks")


def remove(*numbers: int) -> Callable[[Path], None]:
    return lambda folder: [shard_path(folder, number).unlink() for number in numbers] and None


def cut(number: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(shard_path(folder, number), os.path.getsize(shard_path(folder, number)) - 1)


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [change(folder) for change in changes] and None


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (remove(1), "shard 1 of 9 is missing; finish with gasp-fast tracks"),
        (remove(0, 1, 2, 5, 8), r"5 of 9 shards are missing \(0-2,5,8\); finish with gasp-fast tracks"),
        (cut(3), "shard 3 of 9 is damaged; finish with gasp-fast tracks"),
        (both(remove(2, 3), cut(4)), r"2 of 9 shards are missing \(2-3\), shard 4 of 9 is damaged; finish"),
    ],
)
def test_what_is_missing_or_damaged_is_one_line(folder: Path, damage: Callable[[Path], None], line: str) -> None:
    damage(folder)
    with pytest.raises(OSError, match=f"{folder}: {line}") as caught:
        AnnotationReader(folder).check_complete()
    assert "\n" not in str(caught.value)


def test_shards_of_other_settings_are_one_line(
    folder: Path, library: Path, settings: AnnotationSettings, tmp_path: Path
) -> None:
    list(annotate(library, tmp_path / "other", replace(settings, grid=4)))
    for number in (4, 5):
        os.replace(shard_path(tmp_path / "other", number), shard_path(folder, number))
    with pytest.raises(OSError, match=r"2 of 9 shards are made with other settings \(4-5\)"):
        AnnotationReader(folder).check_complete()


def test_the_inventory_names_the_jobs_that_have_not_finished(folder: Path, settings: AnnotationSettings) -> None:
    remove(1, 5, 6)(folder)
    found = take_inventory(folder, settings)
    assert found.unfinished_parts(4) == [1, 2] and found.unfinished_parts(9) == [1, 5, 6]
    assert found.unfinished_parts(10**30) == [1, 5, 6]
    assert take_inventory(folder, settings, [0, 2, 3]).bad == []


def test_a_complete_folder_has_no_fault_and_a_size(folder: Path, settings: AnnotationSettings) -> None:
    found = take_inventory(folder, settings)
    assert found.fault == "" and found.bytes == sum(path.stat().st_size for path in folder.glob("tracks-*"))


def test_questions_are_not_made_from_half_of_the_tracks(folder: Path, library: Path, tmp_path: Path) -> None:
    remove(7)(folder)
    with pytest.raises(OSError, match="shard 7 of 9 is missing"):
        next(make_vqa(library, folder, tmp_path / "vqa"))
    assert next(make_vqa(library, folder, tmp_path / "vqa", part=(0, 9))) == 0  # needs its own shards only


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([3], "3"),
        ([0, 1, 2], "0-2"),
        ([0, 2, 3, 9], "0,2-3,9"),
        (range(0, 99, 2), ",".join(map(str, range(0, 24, 2))) + ",..."),
    ],
)
def test_numbers_are_shown_as_slurm_takes_them(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text

"""Depth of a library: divided over the jobs of an array, continued after a kill, and checked as a whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.commands import run
from support.many_scenes import COMPUTED, write_library

from gasp_fast.cli import depth as command
from gasp_fast.data.scenes.computed_depth import FOLDER, INDEX, read_index
from gasp_fast.data.scenes.open import open_scene

pytest.importorskip("pycolmap")
SCENES = 5


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Five scenes with stereo maps and without computed depth."""
    write_library(COMPUTED, tmp_path / "linked", SCENES, 6)
    shutil.copytree(tmp_path / "linked", tmp_path / "library")  # no links: a test changes files
    for folder in (tmp_path / "library").glob(f"*/{FOLDER}"):
        shutil.rmtree(folder)
    return tmp_path / "library"


def made(library: Path) -> dict[str, int]:
    """The scenes with computed depth, and when it was written."""
    return {path.parent.parent.name: path.stat().st_mtime_ns for path in library.glob(f"*/{FOLDER}/{INDEX}")}


def names(*numbers: int) -> set[str]:
    return {f"scene-{number:04d}" for number in numbers}


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_jobs_take_every_nth_scene_and_together_all(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, library, "--shard", "1/2") == 0
    assert made(library).keys() == names(1, 3)
    assert lines(capsys)[-1] == "job 1/2: 2 of 2 scenes have depth (2 mvs)"
    assert run(command, library, "--shard", "0/2") == 0
    assert made(library).keys() == names(0, 1, 2, 3, 4)
    assert run(command, library, "--shard", "7/8") == 0
    assert lines(capsys)[-1] == f"{library}: fewer scenes than jobs, none for --shard 7/8"
    with pytest.raises(ValueError, match="--shard 8/8: give I/N with 0 <= I < N"):
        run(command, library, "--shard", "8/8")


def test_a_killed_job_continues_with_the_scene_in_hand(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = np.save
    written: list[object] = []

    def dies(*arguments: object) -> None:
        written.append(arguments)
        if len(written) == 15:  # the third map of the third scene
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(np, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        run(command, library)
    monkeypatch.setattr(np, "save", write)
    before = made(library)
    assert before.keys() == names(0, 1)
    (library / "scene-0002" / FOLDER / ".0003.npy.17.partial").write_bytes(b"x")
    capsys.readouterr()
    assert run(command, library) == 0
    after = made(library)
    assert after.keys() == names(0, 1, 2, 3, 4) and before.items() <= after.items()
    printed = lines(capsys)
    assert sum("has computed depth already" in line for line in printed) == 2
    assert any(line.startswith("3 of 5 scenes to compute, 18 frames, at most about 43.7 kB") for line in printed)
    (estimate,) = [line for line in printed if line.startswith("3 of 5 scenes to compute")]
    assert estimate.endswith(" s (from one frame)")
    assert printed.index(estimate) < next(n for n, line in enumerate(printed) if "frames usable" in line)
    assert any("for the other 2 scenes (measured)" in line for line in printed)
    assert not list(library.rglob("*.partial"))


def move_a_camera(root: Path) -> None:
    meta = json.loads((root / "transforms.json").read_text())
    meta["frames"][2]["transform_matrix"][0][3] += 0.01
    (root / "transforms.json").write_text(json.dumps(meta))


def lose_a_map(root: Path) -> None:
    (root / FOLDER / "0003.npy").unlink()


@pytest.mark.parametrize(
    ("change", "why"),
    [(move_a_camera, "its frames, poses or cameras have changed"), (lose_a_map, "computed_depth/0003.npy is missing")],
)
def test_depth_that_does_not_belong_to_its_scene_is_computed_again(
    library: Path, change, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(command, library)
    before = made(library)
    change(library / "scene-0003")
    capsys.readouterr()
    assert run(command, library, "--check") == 1
    assert f"{library}/scene-0003: to be computed: {why}" in lines(capsys)
    assert made(library) == before
    assert run(command, library) == 0
    after = made(library)
    assert {name for name in before if before[name] != after[name]} == names(3)
    assert run(command, library, "--check") == 0


def test_an_index_of_before_is_kept(library: Path) -> None:
    """Indices of earlier versions do not name the scene."""
    run(command, library)
    for path in library.glob(f"*/{FOLDER}/{INDEX}"):
        stored = json.loads(path.read_text())
        del stored["scene"]
        path.write_text(json.dumps(stored))
    before = made(library)
    assert run(command, library) == 0 and made(library) == before
    assert open_scene(library / "scene-0000").has_depth


def test_the_check_names_scenes_without_depth_and_computes_nothing(
    library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(command, library, "--shard", "0/2")
    (library / "scene-0004" / "transforms.json").write_text("{")
    capsys.readouterr()
    assert run(command, library, "--check") == 1
    printed = lines(capsys)
    assert printed[0].startswith(f"failed: {library}/scene-0004/transforms.json: not JSON")
    assert printed[1:3] == [f"{library}/scene-000{n}: to be computed" for n in (1, 3)]
    assert printed[-1] == "2 of 5 scenes have depth (2 mvs); 3 have none"
    assert made(library).keys() == names(0, 2, 4)


def test_the_check_finds_depth_of_two_models(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(command, library)
    for number, model in ((1, "weights/a"), (2, "weights/a"), (3, "weights/b")):
        path = library / f"scene-000{number}" / FOLDER / INDEX
        path.write_text(json.dumps({**json.loads(path.read_text()), "source": "model", "model": model}))
    capsys.readouterr()
    assert run(command, library, "--check") == 1
    assert lines(capsys)[-2:] == [
        "5 of 5 scenes have depth (2 model weights/a, 1 model weights/b, 2 mvs)",
        "their depth is of different models; --force computes it again",
    ]
    assert run(command, library / "scene-0003", "--check") == 0


def test_a_scene_without_a_usable_frame_is_not_tried_again(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (library / "scene-0001").rglob("*.geometric.bin"):
        path.write_bytes(b"1&1&1&" + bytes(4))
    assert run(command, library) == 1
    before = made(library)
    assert not read_index(library / "scene-0001" / FOLDER / INDEX).usable
    assert run(command, library) == 1 and made(library) == before
    assert run(command, library, "--check") == 1
    assert f"{library}/scene-0001: no usable frame" in lines(capsys)
    assert run(command, library, "--force") == 1
    assert all(stamp != before[name] for name, stamp in made(library).items())


def test_a_scene_without_stereo_maps_does_not_end_the_command(
    library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(library / "scene-0000" / "dense" / "stereo")
    assert run(command, library) == 1
    assert made(library).keys() == names(1, 2, 3, 4)
    assert any(
        line.startswith(f"failed: {library}/scene-0000: no COLMAP stereo maps; give --model") for line in lines(capsys)
    )


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def shrink(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def put_nan(path: Path) -> None:
    depth = np.load(path)
    depth[3, 4] = np.nan
    np.save(path, depth)


def empty(path: Path) -> None:
    np.save(path, np.zeros_like(np.load(path)))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (halve, "cannot read depth"),
        (shrink, "has 45 x 26 pixels, its photograph 45 x 27"),
        (put_nan, "1 of 1,215 values are not finite"),
        (empty, "holds no depth"),
    ],
)
def test_the_check_reads_the_maps_and_names_the_damaged_ones(
    library: Path, damage, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(command, library)
    maps = [np.load(path) for path in sorted(library.rglob(f"{FOLDER}/*.npy"))]
    share = np.mean([depth > 0 for depth in maps])
    capsys.readouterr()
    assert run(command, library, "--check") == 0
    assert f"30 maps read, 0 damaged, {share:.3f} of their values known" in lines(capsys)
    path = library / "scene-0003" / FOLDER / "0002.npy"
    damage(path)
    before = made(library)
    assert run(command, library, "--check") == 1 and made(library) == before
    printed = lines(capsys)
    (named,) = [line for line in printed if line.startswith("damaged: ")]
    assert named.startswith(f"damaged: {path}: ") and reason in named
    assert any(line.startswith("30 maps read, 1 damaged") for line in printed)
    path.unlink()
    assert run(command, library) == 0 and run(command, library, "--check") == 0


def test_many_maps_are_read_in_worker_processes(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(command, library)
    halve(library / "scene-0001" / FOLDER / "0004.npy")
    monkeypatch.setattr(command, "FEWEST_FOR_PROCESSES", 10)
    readers = []
    monkeypatch.setattr(np, "load", lambda *arguments, **options: readers.append(arguments))
    capsys.readouterr()
    assert run(command, library, "--check") == 1
    assert any(line.startswith("30 maps read, 1 damaged") for line in lines(capsys)) and not readers

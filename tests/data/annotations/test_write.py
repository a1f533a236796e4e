"""Annotations have the same bytes however the work was done, and a killed run loses nothing but time."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.commands import run

from gasp_fast.cli import tracks as command
from gasp_fast.data.annotations.read import AnnotationReader
from gasp_fast.data.annotations.settings import AnnotationSettings
from gasp_fast.data.annotations.shard import shard_path
from gasp_fast.data.annotations.write import annotate
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes
from gasp_fast.data.tracks.sequences import is_held_out


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_bytes_do_not_depend_on_processes_or_parts(
    library: Path, settings: AnnotationSettings, cache: AnnotationReader, tmp_path
):
    parallel, parts = tmp_path / "parallel", tmp_path / "parts"
    assert sorted(annotate(library, parallel, settings, workers=2)) == list(range(settings.shards))
    for number in (1, 2, 0):
        assert list(annotate(library, parts, settings, part=(number, 3))) == list(range(number, settings.shards, 3))
    assert hashes(parallel) == hashes(parts) == hashes(cache.folder)


def in_a_fork(work: Callable[[], object], seconds: float | None = None) -> bool:
    """Runs `work` in a child that may kill itself, or is killed after `seconds`. Returns whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def die_at(moment: str, nth: int) -> None:
    """Makes this process kill itself in its `nth` write, at `moment` of that write."""
    replace_file, sync, calls = os.replace, os.fsync, itertools.count(1)

    def end(at: str) -> bool:
        return moment == at and next(calls) == nth

    def syncing(file: int) -> None:
        if end("half written"):
            os.truncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        sync(file)

    def renaming(source: Path, target: Path) -> None:
        if end("before the rename"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace_file(source, target)
        if end("after the rename"):
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync, os.replace = syncing, renaming  # type: ignore[assignment]


def shards_in(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in hashes(folder).items() if not name.startswith(".")}


@pytest.mark.parametrize("moment", ["half written", "before the rename", "after the rename"])
def test_killed_within_a_write_it_restarts_to_the_same_bytes(
    library: Path, settings: AnnotationSettings, cache: AnnotationReader, tmp_path: Path, moment: str
) -> None:
    whole, folder = hashes(cache.folder), tmp_path / "out"
    for nth in (1, 3, 1, 2):  # the first write is that of the settings
        assert in_a_fork(lambda nth=nth: (die_at(moment, nth), list(annotate(library, folder, settings))))
        assert shards_in(folder).items() <= whole.items()
        assert any(name.startswith(".") for name in hashes(folder)) == (moment != "after the rename")
    made = {path: path.stat().st_mtime_ns for path in folder.glob("tracks-*")}
    assert 1 <= len(made) < settings.shards
    list(annotate(library, folder, settings))
    assert hashes(folder) == whole
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in made.items())  # existing shards are kept


def test_killed_at_any_moment_it_restarts_to_the_same_bytes(
    library: Path, settings: AnnotationSettings, cache: AnnotationReader, tmp_path: Path
) -> None:
    whole, draw, states = hashes(cache.folder), random.Random(0), set()
    began = time.perf_counter()
    in_a_fork(lambda: list(annotate(library, tmp_path / "timed", settings)))
    seconds = time.perf_counter() - began
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        for _ in range(4):
            in_a_fork(lambda folder=folder: list(annotate(library, folder, settings)), draw.uniform(0, seconds / 3))
            folder.mkdir(exist_ok=True)
            assert shards_in(folder).items() <= whole.items()
            states.add(frozenset(shards_in(folder)))
        list(annotate(library, folder, settings))
        assert hashes(folder) == whole
    assert len(states) > 3  # the kills hit different moments


def test_the_killed_command_leaves_no_worker_and_restarts_to_the_same_bytes(library: Path, tmp_path: Path) -> None:
    words = ["--min-frames", "4", "--max-frames", "8", "--per-scene", "16", "--shard-size", "2", "--workers", "2"]
    words = [str(library), *words]
    assert run(command, *words, "--out", str(tmp_path / "whole"), "--workers", "1") == 0
    out = tmp_path / "out"
    program = "import sys; from gasp_fast.cli import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "tracks", *words, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("tracks-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= len(list(out.glob("tracks-*"))) < 24
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(process.pid)
    assert run(command, *words, "--out", str(out), "--workers", "1") == 0
    assert hashes(out) == hashes(tmp_path / "whole")


def alive(group: int) -> bool:
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_truncated_shard_is_computed_again(
    library: Path, settings: AnnotationSettings, cache: AnnotationReader, tmp_path: Path
) -> None:
    list(annotate(library, tmp_path, settings))
    path = shard_path(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:-100])
    list(annotate(library, tmp_path, settings))
    assert hashes(tmp_path) == hashes(cache.folder)


def test_a_shard_of_other_settings_is_computed_again(
    library: Path, settings: AnnotationSettings, cache: AnnotationReader, tmp_path
):
    list(annotate(library, tmp_path / "mine", settings))
    list(annotate(library, tmp_path / "other", replace(settings, grid=4)))
    os.replace(shard_path(tmp_path / "other", 1), shard_path(tmp_path / "mine", 1))
    list(annotate(library, tmp_path / "mine", settings))
    assert hashes(tmp_path / "mine") == hashes(cache.folder)


def test_a_scene_that_changed_since_the_settings_were_made_stops_the_run(
    library: Path, settings: AnnotationSettings, tmp_path: Path
) -> None:
    other = replace(settings, scenes=(replace(settings.scenes[0], digest="0" * 16), *settings.scenes[1:]))
    with pytest.raises(ValueError, match="scene-000000: the scene has changed"):
        list(annotate(library, tmp_path, other))


def test_an_unreadable_frame_costs_its_sequences_only_and_is_named(tmp_path: Path) -> None:
    library, out = tmp_path / "library", tmp_path / "out"
    list(render_scenes(library, 2, config=SyntheticConfig(frames=6, width=64, height=64, samples=1)))
    (library / "scene-000001" / "depth" / "000003.png").write_bytes(b"no image")
    words = [str(library), "--out", str(out), "--min-frames", "6", "--max-frames", "6", "--per-scene", "3"]
    assert run(command, *words) == 0
    cache = AnnotationReader(out)
    assert sorted(cache.check_complete().failed) == [3, 4, 5]
    assert all("scene-000001" in reason and "000003" in reason for reason in cache.check_complete().failed.values())
    assert str(tmp_path) not in str(cache.check_complete().failed)  # otherwise the bytes depend on the library's path
    assert len(cache[0].tracks) > 0
    assert len(cache[4].tracks) == 0 and cache[4].tracks.visible.shape == (0, 6)


def test_the_command_estimates_computes_verifies_and_repeats(library: Path, tmp_path: Path, capsys) -> None:
    words = [str(library), "--out", str(tmp_path / "out"), "--min-frames", "4", "--max-frames", "6", "--per-scene", "2"]
    assert run(command, *words, "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    output = capsys.readouterr().out
    stated = int(re.search(r"([\d,]+) bytes a sequence", output)[1].replace(",", ""))
    assert run(command, *words) == 0
    before = hashes(tmp_path / "out")
    assert run(command, *words) == 0
    assert hashes(tmp_path / "out") == before
    assert run(command, *words, "--verify") == 0
    damaged = bytearray(shard_path(tmp_path / "out", 0).read_bytes())
    damaged[-200] ^= 4
    shard_path(tmp_path / "out", 0).write_bytes(damaged)
    assert run(command, *words, "--verify") == 1
    assert "6 sequences of 3 scenes in 1 shards" in output
    size = shard_path(tmp_path / "out", 0).stat().st_size
    assert 0.4 * stated < (size - 1100) / 6 < stated  # apart from the header


def test_held_out_scenes_are_never_annotated(library: Path, tmp_path: Path) -> None:
    share = next(s / 100 for s in range(100) if sum(is_held_out(f"scene-{n:06d}", s / 100) for n in range(3)) == 1)
    words = [str(library), "--out", str(tmp_path), "--min-frames", "4", "--max-frames", "4", "--held-out", str(share)]
    assert run(command, *words) == 0
    names = [entry.name for entry in AnnotationReader(tmp_path).settings.scenes]
    assert names == [f"scene-{n:06d}" for n in range(3) if not is_held_out(f"scene-{n:06d}", share)]
    with pytest.raises(ValueError, match=r"--held-out 1\.0 leaves no scene"):
        run(command, *words[:-1], "1")


def test_a_bad_part_stops_the_command(library: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--shard 2/2"):
        run(command, str(library), "--out", str(tmp_path), "--shard=2/2", "--min-frames", "4", "--max-frames", "6")

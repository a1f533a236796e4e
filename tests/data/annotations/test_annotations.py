"""The cache's promises: what is read is what would be computed, the bytes never depend on how the work was done, and
neither planning nor reading costs memory per sequence."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gasp_fast.cli import tracks as command
from gasp_fast.data.annotations.cache import (
    OPEN_SHARDS,
    AnnotationCache,
    AnnotationPlan,
    annotate,
    checksum,
    shard_path,
    store_plan,
)
from gasp_fast.data.scenes.library import SceneEntry, find_scenes, survey
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes
from gasp_fast.data.tracks.build import build_tracks
from gasp_fast.data.tracks.sequences import SequenceConfig


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    list(render_scenes(folder, 3, config=SyntheticConfig(frames=12, width=96, height=96, samples=1)))
    return folder


@pytest.fixture(scope="module")
def plan(library: Path) -> AnnotationPlan:
    entries = [entry for entry in survey(library, find_scenes(library)) if isinstance(entry, SceneEntry)]
    return AnnotationPlan(
        scenes=tuple(entries),
        sequences=SequenceConfig(min_frames=4, max_frames=8, per_scene=6, seed=1),
        shard_size=4,
        epochs=2,
    )


@pytest.fixture(scope="module")
def cache(library: Path, plan: AnnotationPlan, tmp_path_factory: pytest.TempPathFactory) -> AnnotationCache:
    folder = tmp_path_factory.mktemp("cache")
    assert list(annotate(library, folder, plan)) == list(range(plan.shards))
    return AnnotationCache(folder)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(list(words))


def test_what_is_read_is_what_would_be_computed(library: Path, cache: AnnotationCache) -> None:
    assert len(cache) == 36
    sampler = cache.plan.sampler
    for index in (0, 3, 4, 17, 18, 35):
        annotation = cache[index]
        drawn = sampler.draw(*divmod(index, 18))
        assert annotation.scene == f"scene-{drawn.scene:06d}"
        expected = build_tracks(open_scene(library / annotation.scene), drawn.frames)
        assert tuple(annotation.tracks.frames) == drawn.frames
        assert len(expected) > 5
        np.testing.assert_array_equal(annotation.tracks.visible, expected.visible)
        for name in ("query", "uv", "depth"):
            np.testing.assert_array_equal(getattr(annotation.tracks, name), getattr(expected, name).astype(np.float32))


def test_epochs_hold_different_sequences(cache: AnnotationCache) -> None:
    assert any(tuple(cache[i].tracks.frames) != tuple(cache[i + 18].tracks.frames) for i in range(18))


def test_bytes_do_not_depend_on_processes_or_parts(
    library: Path, plan: AnnotationPlan, cache: AnnotationCache, tmp_path
):
    parallel, parts = tmp_path / "parallel", tmp_path / "parts"
    assert sorted(annotate(library, parallel, plan, workers=2)) == list(range(plan.shards))
    for number in (1, 2, 0):
        assert list(annotate(library, parts, plan, part=(number, 3))) == list(range(number, plan.shards, 3))
    assert hashes(parallel) == hashes(parts) == hashes(cache.folder)


def in_a_fork(work: Callable[[], object], seconds: float | None = None) -> bool:
    """Runs `work` in a child that may kill itself, or is killed after `seconds`; whether it was killed."""
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


def die_at(moment: str, wanted: int) -> None:
    """From now on this process kills itself in its `wanted`-th write, at the named moment."""
    replace_file, sync, calls = os.replace, os.fsync, itertools.count(1)

    def end(at: str) -> bool:
        return moment == at and next(calls) == wanted

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
    library: Path, plan: AnnotationPlan, cache: AnnotationCache, tmp_path: Path, moment: str
) -> None:
    whole, folder = hashes(cache.folder), tmp_path / "out"
    for wanted in (1, 3, 1, 2):  # the first write is that of the plan
        assert in_a_fork(lambda wanted=wanted: (die_at(moment, wanted), list(annotate(library, folder, plan))))
        assert shards_in(folder).items() <= whole.items()
        assert any(name.startswith(".") for name in hashes(folder)) == (moment != "after the rename")
    made = {path: path.stat().st_mtime_ns for path in folder.glob("tracks-*")}
    assert 1 <= len(made) < plan.shards
    list(annotate(library, folder, plan))
    assert hashes(folder) == whole
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in made.items())  # what was there is kept


def test_killed_at_any_moment_it_restarts_to_the_same_bytes(
    library: Path, plan: AnnotationPlan, cache: AnnotationCache, tmp_path: Path
) -> None:
    whole, draw, states = hashes(cache.folder), random.Random(0), set()
    began = time.perf_counter()
    in_a_fork(lambda: list(annotate(library, tmp_path / "timed", plan)))
    seconds = time.perf_counter() - began
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        for _ in range(4):
            in_a_fork(lambda folder=folder: list(annotate(library, folder, plan)), draw.uniform(0, seconds / 3))
            folder.mkdir(exist_ok=True)
            assert shards_in(folder).items() <= whole.items()
            states.add(frozenset(shards_in(folder)))
        list(annotate(library, folder, plan))
        assert hashes(folder) == whole
    assert len(states) > 3  # the kills did hit different moments


def test_the_killed_command_leaves_no_worker_and_restarts_to_the_same_bytes(library: Path, tmp_path: Path) -> None:
    words = ["--min-frames", "4", "--max-frames", "8", "--per-scene", "16", "--shard-size", "2", "--workers", "2"]
    words = [str(library), *words]
    assert command.run(arguments(*words, "--out", str(tmp_path / "whole"), "--workers", "1")) == 0
    out = tmp_path / "out"
    program = "import sys; from gasp_fast.cli import main; main(sys.argv[1:])"
    run = subprocess.Popen(
        [sys.executable, "-c", program, "tracks", *words, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("tracks-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert 1 <= len(list(out.glob("tracks-*"))) < 24
    while alive(run.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(run.pid)
    assert command.run(arguments(*words, "--out", str(out), "--workers", "1")) == 0
    assert hashes(out) == hashes(tmp_path / "whole")


def alive(group: int) -> bool:
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_half_a_shard_is_made_anew(library: Path, plan: AnnotationPlan, cache: AnnotationCache, tmp_path: Path) -> None:
    list(annotate(library, tmp_path, plan))
    path = shard_path(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:-100])
    list(annotate(library, tmp_path, plan))
    assert hashes(tmp_path) == hashes(cache.folder)


def test_a_shard_of_another_plan_is_made_anew(library: Path, plan: AnnotationPlan, cache: AnnotationCache, tmp_path):
    list(annotate(library, tmp_path / "mine", plan))
    list(annotate(library, tmp_path / "other", replace(plan, grid=4)))
    os.replace(shard_path(tmp_path / "other", 1), shard_path(tmp_path / "mine", 1))
    list(annotate(library, tmp_path / "mine", plan))
    assert hashes(tmp_path / "mine") == hashes(cache.folder)


def test_a_flipped_bit_is_found(library: Path, plan: AnnotationPlan, tmp_path: Path) -> None:
    list(annotate(library, tmp_path, plan))
    path = shard_path(tmp_path, 3)
    content = bytearray(path.read_bytes())
    content[-200] ^= 4
    path.write_bytes(content)
    bad = [number for number, good in AnnotationCache(tmp_path).verify() if not good]
    assert bad == [3]
    assert command.run(arguments("x", "--out", str(tmp_path), "--verify")) == 1


def test_a_checksum_sees_names_types_and_shapes() -> None:
    base = {"a": np.arange(6, dtype=np.int32)}
    variants = [
        base,
        {"b": base["a"]},
        {"a": base["a"].reshape(2, 3)},
        {"a": base["a"].view(np.uint32)},
        {"a": base["a"][::-1]},
    ]
    assert len({checksum(arrays) for arrays in variants}) == len(variants)


def test_another_plan_is_refused_and_the_difference_named(library: Path, plan: AnnotationPlan, cache: AnnotationCache):
    with pytest.raises(ValueError, match="grid: 8 there, 24 now"):
        next(annotate(library, cache.folder, replace(plan, grid=24)))
    with pytest.raises(ValueError, match="scenes: 3 there, 2 now"):
        next(annotate(library, cache.folder, replace(plan, scenes=plan.scenes[:2])))


def test_a_scene_that_changed_since_the_plan_stops_the_run(library: Path, plan: AnnotationPlan, tmp_path: Path) -> None:
    other = replace(plan, scenes=(replace(plan.scenes[0], digest="0" * 16), *plan.scenes[1:]))
    with pytest.raises(ValueError, match="scene-000000: the scene has changed"):
        list(annotate(library, tmp_path, other))


def test_an_unreadable_frame_costs_its_sequences_and_is_named(tmp_path: Path) -> None:
    library, out = tmp_path / "library", tmp_path / "out"
    list(render_scenes(library, 2, config=SyntheticConfig(frames=6, width=64, height=64, samples=1)))
    (library / "scene-000001" / "depth" / "000003.png").write_bytes(b"no image")
    words = [str(library), "--out", str(out), "--min-frames", "6", "--max-frames", "6", "--per-scene", "3"]
    assert command.run(arguments(*words)) == 0
    cache = AnnotationCache(out)
    assert sorted(cache.failed()) == [3, 4, 5]
    assert all("scene-000001" in reason and "000003" in reason for reason in cache.failed().values())
    assert str(tmp_path) not in str(cache.failed())  # or the bytes would depend on where the library lies
    assert len(cache[0].tracks) > 0
    assert len(cache[4].tracks) == 0 and cache[4].tracks.visible.shape == (0, 6)


def test_the_command_makes_verifies_and_repeats(library: Path, tmp_path: Path, capsys) -> None:
    words = [str(library), "--out", str(tmp_path / "out"), "--min-frames", "4", "--max-frames", "6", "--per-scene", "2"]
    assert command.run(arguments(*words, "--dry-run")) == 0
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    stated = int(re.search(r"([\d,]+) bytes a sequence", said)[1].replace(",", ""))
    assert command.run(arguments(*words)) == 0
    before = hashes(tmp_path / "out")
    assert command.run(arguments(*words)) == 0
    assert hashes(tmp_path / "out") == before
    assert command.run(arguments(*words, "--verify")) == 0
    assert "6 sequences of 3 scenes in 1 shards" in said
    size = shard_path(tmp_path / "out", 0).stat().st_size
    assert 0.4 * stated < (size - 1100) / 6 < stated  # apart from the header


def test_held_out_scenes_never_enter_the_cache(library: Path, tmp_path: Path) -> None:
    from gasp_fast.data.tracks.sequences import is_held_out

    share = next(s / 100 for s in range(100) if sum(is_held_out(f"scene-{n:06d}", s / 100) for n in range(3)) == 1)
    words = [str(library), "--out", str(tmp_path), "--min-frames", "4", "--max-frames", "4", "--held-out", str(share)]
    assert command.run(arguments(*words)) == 0
    names = [entry.name for entry in AnnotationCache(tmp_path).plan.scenes]
    assert names == [f"scene-{n:06d}" for n in range(3) if not is_held_out(f"scene-{n:06d}", share)]
    with pytest.raises(ValueError, match=r"--held-out 1\.0 leaves no scene"):
        command.run(arguments(*words[:-1], "1"))


def test_a_cache_pickles_into_a_worker(cache: AnnotationCache) -> None:
    cache[0]
    twin = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(twin[20].tracks.uv, cache[20].tracks.uv)


def test_a_plan_survives_its_json(plan: AnnotationPlan) -> None:
    assert AnnotationPlan.from_json(plan.to_json()) == plan


def test_planning_two_million_sequences_is_quick_and_small() -> None:
    entries = tuple(SceneEntry(f"1K/{n:064x}", 350, f"{n:016x}") for n in range(10_000))
    start = time.perf_counter()
    plan = AnnotationPlan(scenes=entries, sequences=SequenceConfig(per_scene=175))
    assert len(plan) == 1_750_000 and plan.shards == 1709
    assert len(plan.to_json()) / len(plan) < 1.2  # bytes of plan per sequence
    plan.sampler.draw(0, 1_749_999)
    assert time.perf_counter() - start < 2
    assert plan.expected_bytes < 15e9


def test_the_expected_size_is_an_upper_bound_and_not_a_loose_one(cache: AnnotationCache) -> None:
    size = sum(shard_path(cache.folder, n).stat().st_size for n in range(cache.plan.shards))
    assert 0.5 * cache.plan.expected_bytes < size - 1100 * cache.plan.shards < cache.plan.expected_bytes


def test_shards_open_lazily_and_memory_stays_flat(tmp_path: Path) -> None:
    """A cache of many large shards is read from end to end; private memory must not follow."""
    program = """
import sys, pathlib, json, numpy as np
from safetensors.numpy import save
from gasp_fast.data.annotations.cache import *
from gasp_fast.data import annotations
folder = pathlib.Path(sys.argv[1])
plan = AnnotationPlan(scenes=(SceneEntry("s", 60, "0"),), shard_size=64, sequences=SequenceConfig(per_scene=64 * 40))
store_plan(folder, plan)
draw = np.random.default_rng(0)
tracks = []
for _ in range(64):
    uv = draw.random((300, 24, 2))
    tracks.append(Tracks(np.arange(24), uv[:, 0], uv, uv[..., 0] > 0.5, uv[..., 1]))
arrays = annotations._join([0] * 64, tracks)
header = {"version": 1, "plan": plan.digest, "checksum": checksum(arrays), "failed": {}}
content = save(arrays, {"gasp_fast": json.dumps(header)})
for number in range(plan.shards):
    shard_path(folder, number).write_bytes(content)
def private():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
cache = AnnotationCache(folder)
for index in range(64 * 4):
    cache[index]
before = private()
for index in range(len(cache)):
    assert len(cache[index].tracks) == 300
print(len(content) * plan.shards, private() - before, len(cache._shards))
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to see the memory of a process")
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True)
    total, grown, opened = (int(n) for n in run.stdout.split())
    assert total > 200e6
    assert grown < 4e6
    assert opened == OPEN_SHARDS


def test_missing_and_foreign_shards_are_named(library: Path, plan: AnnotationPlan, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no annotations here"):
        AnnotationCache(tmp_path)
    store_plan(tmp_path, plan)
    with pytest.raises(OSError, match="shard 1 of 9 is missing"):
        AnnotationCache(tmp_path)[5]
    list(annotate(library, tmp_path / "other", replace(plan, grid=4)))
    os.replace(shard_path(tmp_path / "other", 1), shard_path(tmp_path, 1))
    with pytest.raises(ValueError, match="another plan"):
        AnnotationCache(tmp_path)[5]
    with pytest.raises(IndexError, match="sequence 36"):
        AnnotationCache(tmp_path)[36]


def test_another_version_is_refused(plan: AnnotationPlan, tmp_path: Path) -> None:
    store_plan(tmp_path, plan)
    fields = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**fields, "version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        AnnotationCache(tmp_path)


@pytest.mark.parametrize("part", ["1", "2/2", "a/b", "-1/3"])
def test_a_bad_part_is_named(library: Path, tmp_path: Path, part: str) -> None:
    words = [str(library), "--out", str(tmp_path), f"--part={part}", "--min-frames", "4", "--max-frames", "6"]
    with pytest.raises(ValueError, match=f"--part {part}"):
        command.run(arguments(*words))

"""What is read is what was computed, only the bytes that are needed are read, and damage is found."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gasp_fast.data.annotations.read import OPEN_SHARDS, AnnotationReader
from gasp_fast.data.annotations.settings import AnnotationSettings, store_settings
from gasp_fast.data.annotations.shard import shard_path
from gasp_fast.data.annotations.write import annotate
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.tracks.build import build_tracks


def test_what_is_read_is_what_would_be_computed(library: Path, cache: AnnotationReader) -> None:
    assert len(cache) == 36
    sampler = cache.settings.sampler
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


def test_epochs_hold_different_sequences(cache: AnnotationReader) -> None:
    assert any(tuple(cache[i].tracks.frames) != tuple(cache[i + 18].tracks.frames) for i in range(18))


def test_a_cache_pickles_into_a_worker(cache: AnnotationReader) -> None:
    cache[0]
    twin = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(twin[20].tracks.uv, cache[20].tracks.uv)


def test_a_flipped_bit_is_found(library: Path, settings: AnnotationSettings, tmp_path: Path) -> None:
    list(annotate(library, tmp_path, settings))
    flip_a_bit(shard_path(tmp_path, 3))
    bad = [number for number, good in AnnotationReader(tmp_path).verify() if not good]
    assert bad == [3]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-200] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_is_found_when_its_shard_is_first_read(
    library: Path, settings: AnnotationSettings, tmp_path: Path
) -> None:
    list(annotate(library, tmp_path, settings))
    flip_a_bit(shard_path(tmp_path, 3))
    cache = AnnotationReader(tmp_path)
    assert len(cache[0].tracks)
    for _ in range(2):
        with pytest.raises(OSError, match=r"tracks-00003\.safetensors: damaged \(wrong checksum\)"):
            cache[3 * settings.shard_size]


def test_a_shard_is_compared_once_in_a_process(cache: AnnotationReader, monkeypatch: pytest.MonkeyPatch) -> None:
    import gasp_fast.data.annotations.read as module

    compared: list[int] = []
    whole = module.is_intact
    monkeypatch.setattr(module, "is_intact", lambda *shard: (compared.append(1), whole(*shard))[1])
    reader = AnnotationReader(cache.folder)
    for _ in range(3):
        for index in range(len(reader)):
            reader[index]
    assert len(compared) == reader.settings.shards


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, b"\xff" * 8 + b"{}", "pipe", "folder"])
def test_any_file_in_place_of_a_shard_is_one_line(
    settings: AnnotationSettings, tmp_path: Path, damage: bytes | str
) -> None:
    store_settings(tmp_path, settings)
    path = shard_path(tmp_path, 0)
    if damage == "pipe":
        os.mkfifo(path)
    elif damage == "folder":
        path.mkdir()
    else:
        assert isinstance(damage, bytes)
        path.write_bytes(damage)
    with pytest.raises(OSError, match=r"tracks-00000\.safetensors") as caught:
        AnnotationReader(tmp_path)[0]
    assert "\n" not in str(caught.value)


def test_shards_open_lazily_and_memory_stays_flat(tmp_path: Path) -> None:
    """Reads many large shards from end to end: private memory does not grow."""
    program = """
import sys, pathlib, numpy as np
from gasp_fast.data.annotations.settings import AnnotationSettings, store_settings
from gasp_fast.data.annotations.read import AnnotationReader
from gasp_fast.data.annotations.shard import shard_arrays, shard_bytes, shard_path
from gasp_fast.data.scenes.library import SceneEntry
from gasp_fast.data.tracks.build import Tracks
from gasp_fast.data.tracks.sequences import SequenceConfig
folder = pathlib.Path(sys.argv[1])
sequences = SequenceConfig(per_scene=64 * 40)
settings = AnnotationSettings(scenes=(SceneEntry("s", 60, "0"),), shard_size=64, sequences=sequences)
store_settings(folder, settings)
draw = np.random.default_rng(0)
tracks = []
for _ in range(64):
    uv = draw.random((300, 24, 2))
    tracks.append(Tracks(np.arange(24), uv[:, 0], uv, uv[..., 0] > 0.5, uv[..., 1]))
content = shard_bytes(shard_arrays([0] * 64, tracks), settings.digest, {})
for number in range(settings.shards):
    shard_path(folder, number).write_bytes(content)
def private():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
cache = AnnotationReader(folder)
for index in range(64 * 4):
    cache[index]
before = private()
for index in range(len(cache)):
    assert len(cache[index].tracks) == 300
mapped = {line.split()[-1] for line in open("/proc/self/maps") if "tracks-" in line}
print(len(content) * settings.shards, private() - before, len(mapped))
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to see the memory of a process")
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True)
    total, grown, opened = (int(n) for n in run.stdout.split())
    assert total > 200e6
    assert grown < 4e6
    assert opened == OPEN_SHARDS


def test_missing_and_foreign_shards_are_named(library: Path, settings: AnnotationSettings, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no annotations here"):
        AnnotationReader(tmp_path)
    store_settings(tmp_path, settings)
    with pytest.raises(OSError, match="shard 1 of 9 is missing"):
        AnnotationReader(tmp_path)[5]
    list(annotate(library, tmp_path / "other", replace(settings, grid=4)))
    os.replace(shard_path(tmp_path / "other", 1), shard_path(tmp_path, 1))
    with pytest.raises(ValueError, match="other settings"):
        AnnotationReader(tmp_path)[5]
    with pytest.raises(IndexError, match="sequence 36"):
        AnnotationReader(tmp_path)[36]

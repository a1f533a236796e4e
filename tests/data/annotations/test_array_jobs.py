"""Jobs of an array, in any number and order, killed or not, write what one job writes; and say what is not done."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commands import run

from gasp_fast.cli import tracks as command
from gasp_fast.data.annotations.read import AnnotationReader
from gasp_fast.data.annotations.settings import AnnotationSettings, store_settings
from gasp_fast.data.scenes import library as scene_library
from gasp_fast.data.scenes.library import SceneEntry
from gasp_fast.data.tracks.sequences import SequenceConfig

OPTIONS = ["--min-frames", "4", "--max-frames", "8", "--per-scene", "6", "--shard-size", "2", "--workers", "1"]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one job writes: 9 shards and the settings."""
    out = tmp_path_factory.mktemp("whole")
    assert run(command, library, "--out", out, *OPTIONS) == 0
    return hashes(out)


def job(library: Path, out: Path, shard: str, *more: str) -> int:
    return run(command, library, "--out", out, *OPTIONS, "--shard", shard, *more)


def test_arrays_of_any_size_write_what_one_job_writes(library: Path, whole: dict[str, str], tmp_path: Path) -> None:
    for count in (2, 5, 20):
        for number in random.Random(count).sample(range(count), count):
            assert job(library, tmp_path / str(count), f"{number}/{count}") == 0
        assert hashes(tmp_path / str(count)) == whole


def test_each_job_says_what_is_not_finished_and_the_last_that_all_is(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shard, line in (
        ("1/4", "2 of 9 shards so far; not finished, or still at work: 3 of 4 jobs (0,2-3)"),
        ("3/4", "4 of 9 shards so far; not finished, or still at work: 2 of 4 jobs (0,2)"),
        ("0/4", "7 of 9 shards so far; not finished, or still at work: 1 of 4 jobs (2)"),
        ("2/4", "complete, 18 sequences"),
    ):
        assert job(library, tmp_path, shard) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith(f"{tmp_path}: {line}")


def test_an_array_of_another_size_finishes_what_one_has_begun(
    library: Path, whole: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job(library, tmp_path, "3/4")
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("tracks-*")}
    for number in range(3):
        job(library, tmp_path, f"{number}/3")
    assert hashes(tmp_path) == whole
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in made.items())
    assert "1 of 3 shards are there already" in capsys.readouterr().out


def started(library: Path, out: Path, shard: str) -> subprocess.Popen[bytes]:
    program = "import sys; from gasp_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["tracks", str(library), "--out", str(out), *OPTIONS, "--shard", shard]
    return subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.DEVNULL)


def test_jobs_that_start_at_the_same_time_write_what_one_job_writes(
    library: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    jobs = [started(library, tmp_path / "out", f"{number}/4") for number in range(4)]
    assert [process.wait(120) for process in jobs] == [0] * 4
    assert hashes(tmp_path / "out") == whole


def test_jobs_killed_at_any_moment_finish_when_submitted_again(
    library: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    draw, out = random.Random(1), tmp_path / "out"
    for _ in range(4):
        jobs = [started(library, out, f"{number}/3") for number in range(3)]
        time.sleep(draw.uniform(0.6, 1.8))
        for process in jobs:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kept = {name: digest for name, digest in hashes(out).items() if name[0] != "."} if out.exists() else {}
        assert kept.items() <= whole.items()
    for number in range(3):
        assert job(library, out, f"{number}/3") == 0
    assert {name: digest for name, digest in hashes(out).items() if name[0] != "."} == whole
    assert job(library, out, "0/1") == 0
    assert hashes(out) == whole  # nor a temporary file


def test_the_first_settings_stay_when_two_jobs_write_them_at_the_same_time(
    settings: AnnotationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Job A finds no settings; before it writes, job B has written others, because a scene got depth in between."""
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.name != "plan.json" and exists(path))
    store_settings(tmp_path, settings)
    other = AnnotationSettings(scenes=settings.scenes[:2], sequences=settings.sequences, shard_size=4, epochs=2)
    with pytest.raises(ValueError, match=r"other settings \(scenes: 3 there, 2 now"):
        store_settings(tmp_path, other)
    assert AnnotationReader(tmp_path).settings == settings


def test_a_job_opens_no_scene_that_the_settings_name(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job(library, tmp_path, "0/9", "--plan-only") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]
    monkeypatch.setattr(scene_library, "open_scene", lambda root: pytest.fail(f"opened {root}"))
    assert job(library, tmp_path, "3/9") == 0
    assert [path.name for path in tmp_path.glob("tracks-*")] == ["tracks-00003.safetensors"]
    with pytest.raises(ValueError, match="grid: 8 there, 24 now"):
        job(library, tmp_path, "4/9", "--grid", "24")


def test_a_scene_that_is_new_gone_or_changed_since_the_settings_stops_a_job(library: Path, tmp_path: Path) -> None:
    copy, out = shutil.copytree(library, tmp_path / "library"), tmp_path / "out"
    job(copy, out, "0/9")
    shutil.copytree(copy / "scene-000000", copy / "scene-000009")
    with pytest.raises(ValueError, match="scenes: 3 there, 4 now"):
        job(copy, out, "1/9")
    shutil.rmtree(copy / "scene-000009")
    (copy / "scene-000002" / "pose" / "000003.txt").unlink()
    job(copy, out, "1/9")
    with pytest.raises(ValueError, match=r"scene-000002: the scene has changed \(11 frames instead of 12\)"):
        job(copy, out, "8/9")
    shutil.rmtree(copy / "scene-000002")
    with pytest.raises(ValueError, match="scenes: 3 there, 2 now"):
        job(copy, out, "1/9")


def test_wrong_options_are_found_before_any_scene_is_read(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scene_library, "open_scene", lambda root: pytest.fail(f"opened {root}"))
    for words, message in (
        (["--grid", "0"], "grid = 0"),
        (["--keep", "2"], "keep = 2"),
        (["--min-frames", "9"], "min_frames = 9, max_frames = 8"),
        (["--workers", "0"], "--workers 0: 1 to 1,024"),
        (["--workers", "1000000000000"], "--workers 1000000000000: 1 to 1,024"),
        (["--shard", "4/4"], "--shard 4/4: give I/N with 0 <= I < N"),
        (["--shard-size", "1000000", "--grid", "1024"], "shard_size = 1000000: a shard would have up to .* GB"),
    ):
        with pytest.raises(ValueError, match=message):
            run(command, library, "--out", tmp_path / "out", *OPTIONS, *words)
    assert not (tmp_path / "out").exists()


def test_scenes_that_are_left_out_are_counted_named_and_stored(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, out = shutil.copytree(library, tmp_path / "library"), tmp_path / "out"
    shutil.rmtree(copy / "scene-000001" / "depth")
    (copy / "scene-000001" / "computed_depth").mkdir()
    (copy / "scene-000002" / "meta.json").write_text("{")
    assert run(command, copy, "--out", out, *OPTIONS) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("skipped scene-000001: no depth; gasp-fast depth was stopped here; run it again")
    assert printed[1].startswith("skipped scene-000002: scene-000002/meta.json: not JSON")
    assert printed[2] == "skipped 2 of 3 scenes: 1 without depth, 1 unusable"
    assert list(AnnotationReader(out).skipped()) == ["scene-000001", "scene-000002"]
    assert str(tmp_path) not in (out / "skipped.json").read_text().replace(f"gasp-fast depth {copy}", "")
    (out / "skipped.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"skipped\.json: not a list of scenes"):
        AnnotationReader(out).skipped()


def test_shards_with_sequences_without_tracks_are_computed_again_on_request(
    library: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    copy, out = shutil.copytree(library, tmp_path / "library"), tmp_path / "out"
    image = copy / "scene-000001" / "depth" / "000003.png"
    content = image.read_bytes()
    image.write_bytes(b"")
    run(command, copy, "--out", out, *OPTIONS)
    assert AnnotationReader(out).check_complete().failed
    image.write_bytes(content)
    run(command, copy, "--out", out, *OPTIONS)
    assert AnnotationReader(out).check_complete().failed  # without the option, what is there stays
    run(command, copy, "--out", out, *OPTIONS, "--retry-failed")
    assert hashes(out) == whole


def test_time_and_bytes_are_estimated_from_the_first_sequences(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, library, "--out", tmp_path / "out", *OPTIONS) == 0
    printed = capsys.readouterr().out
    found = re.search(
        r"all of it, 18 sequences: about \d+ s on 1 core, ([\d.]+) kB \(measured on the first 6\)", printed
    )
    assert found is not None, printed
    arrays = sum(path.stat().st_size for path in (tmp_path / "out").glob("tracks-*")) - 9 * 1100  # without the headers
    assert 0.7 < float(found[1]) * 1000 / arrays < 1.4
    capsys.readouterr()
    assert job(library, tmp_path / "dry", "1/2", "--dry-run") == 0
    assert "this job, 8 sequences: about" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()


def test_leftovers_of_killed_runs_are_deleted_before_the_disk_is_judged(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leftovers = [tmp_path / f".{name}.17.partial" for name in ("plan.json", "tracks-00004.safetensors")]
    for path in leftovers:
        path.write_bytes(b"x")
    (tmp_path / ".notes.partial").write_bytes(b"not ours")
    usage = shutil.disk_usage

    def judged(path: Path):
        assert not any(leftover.exists() for leftover in leftovers)
        return usage(path)._replace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", judged)
    assert run(command, library, "--out", tmp_path, *OPTIONS) == 0
    assert f"only 1.0 kB are free in {tmp_path}" in capsys.readouterr().out
    assert (tmp_path / ".notes.partial").exists()


def test_the_log_of_a_job_has_a_line_of_progress_a_minute(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gasp_fast.progress.LINE_EVERY", 0.0)
    assert run(command, library, "--out", tmp_path, *OPTIONS) == 0
    printed = capsys.readouterr().out
    assert "reading scenes: 2 of 3, about 0 s left" in printed
    assert re.search(r"computing tracks: 5 of 9, about \d+ s left", printed)


def test_ten_thousand_scenes_have_small_settings_that_a_job_reads_quickly(tmp_path: Path) -> None:
    entries = tuple(SceneEntry(f"1K/{n:064x}", 350, f"{n:016x}") for n in range(10_000))
    settings = AnnotationSettings(scenes=entries, sequences=SequenceConfig(per_scene=175))
    store_settings(tmp_path, settings)
    began = time.perf_counter()
    assert AnnotationReader(tmp_path).settings == settings
    assert time.perf_counter() - began < 2
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 1

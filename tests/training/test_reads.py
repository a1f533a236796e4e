"""Reading from a network file system: few calls at the start, and a read that never ends ends the run with a line."""

import fcntl
import os
import re
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support.runs import assert_ended, family_of, launch, wait_for, write_config

from gasp_fast.training.stream import SampleStream


@contextmanager
def files_that_do_not_open(paths):
    """Other processes wait when they open these files. A lease is broken after 45 seconds, by default."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # how the kernel says that a process waits
    files = [os.open(path, os.O_RDWR) for path in paths]
    try:
        for file in files:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        for file in files:
            os.close(file)
        signal.signal(signal.SIGIO, before)


def run_with_one_scene_that_is_not_read(config, assets, tmp_path, workers, timeout):
    """The configuration of a run, the files of the scene, and the first sample that needs them. It is not in step 1."""
    library = tmp_path / "library"
    shutil.copytree(assets.scenes, library)
    settings = config(scenes={"root": str(library)}, train={"steps": 50}, run={"timeout": timeout})
    settings = replace(settings, data=replace(settings.data, workers=workers))
    described = [SampleStream(settings.data).describe(position) for position in range(16)]
    scene = next(f"scene-{n}" for n in range(4) if f" scene-{n}," not in "".join(described[:2]))
    first = next(text for text in described if f" {scene}," in text)
    return settings, list((library / scene / "depth").iterdir()), first


@pytest.mark.parametrize(("workers", "timeout"), [(0, 10.0), (1, 40.0)])  # seconds; a worker takes some to start
def test_a_read_that_does_not_end_ends_the_run_and_names_the_sample(config, assets, tmp_path, workers, timeout):
    settings, files, sample = run_with_one_scene_that_is_not_read(config, assets, tmp_path, workers, timeout)
    with files_that_do_not_open(files):
        process = launch(1, "-m", "gasp_fast.train", write_config(settings, tmp_path / "c.yaml"))
        wait_for(process, settings.run.out, 1, 100)
        family, start = family_of(process), time.monotonic()
        output, _ = process.communicate(timeout=timeout)
    assert time.monotonic() - start < timeout and process.returncode == 1, output
    (line,) = output.splitlines()
    assert line.startswith(f"gasp_fast.train: not read after {timeout / 2:g} s, half of run.timeout: ")
    assert sample in line and line.endswith("raise run.timeout")
    assert_ended(family)


@pytest.mark.slow
def test_a_read_that_does_not_end_on_one_of_two_processes_ends_both_in_time(config, assets, tmp_path):
    settings, files, sample = run_with_one_scene_that_is_not_read(config, assets, tmp_path, 0, 20.0)
    with files_that_do_not_open(files):
        process = launch(
            1, "-m", "gasp_fast.training.launch", "--standalone", "--nproc-per-node", 2, "--shutdown-timeout", 3,
            "-m", "gasp_fast.train", write_config(settings, tmp_path / "c.yaml"),
        )  # fmt: skip
        wait_for(process, settings.run.out, 1, 200)
        family, start = family_of(process), time.monotonic()
        output, _ = process.communicate(timeout=60)
    assert time.monotonic() - start < 20 and process.returncode == 1 and "Traceback" not in output, output
    assert output.count("gasp_fast.train: not read after 10 s") == 1 and sample in output
    assert output.count(" lost another, which ended or froze: ") == 1
    assert_ended(family)


@pytest.mark.slow
def test_only_the_first_of_two_processes_opens_every_scene_at_the_start(config, assets, tmp_path):
    library = tmp_path / "library"
    for copy in "abc":
        shutil.copytree(assets.scenes, library / copy)
    settings = config(scenes={"root": str(library)}, train={"steps": 1})
    path = write_config(settings, tmp_path / "c.yaml")
    process = launch(2, Path(__file__).with_name("scenes_opened_in_a_run.py"), path)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]
    opened = dict(re.findall(r"rank (\d) opened (\d+)", output))
    assert 12 <= int(opened["0"]) <= 14  # all of them, one to see its size, one for its sample
    assert int(opened["1"]) == 1

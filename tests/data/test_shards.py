"""Work in processes: nothing is lost, the first error counts, and nobody outlives the one who asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gasp_fast.data.shards import _one_thread_a_worker, in_processes, usable_cores


def square(number: int) -> int:
    if number == 13:
        raise ValueError("thirteen")
    return number * number


def with_threads(number: int) -> tuple[int, str | None]:
    return square(number), os.environ.get("OMP_NUM_THREADS")


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_every_piece_comes_back_with_its_result() -> None:
    assert list(in_processes(square, range(9), 1)) == [(n, n * n) for n in range(9)]


def test_processes_give_the_same_and_do_not_multiply_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert sorted(in_processes(with_threads, range(9), 2)) == [(n, (n * n, "1")) for n in range(9)]
    assert "OMP_NUM_THREADS" not in os.environ


def test_who_asked_for_threads_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with _one_thread_a_worker():
        assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_stops_the_work(workers: int) -> None:
    with pytest.raises(ValueError, match="thirteen"):
        list(in_processes(square, range(5, 500), workers))


def test_a_killed_worker_is_one_line() -> None:
    with pytest.raises(OSError, match="a worker process was killed") as caught:
        list(in_processes(die, range(4), 2))
    assert "\n" not in str(caught.value)


def test_no_more_cores_than_the_scheduler_grants() -> None:
    assert usable_cores() == len(os.sched_getaffinity(0))


ORPHANS = """
import os, sys, time
from pathlib import Path
from gasp_fast.data.shards import in_processes
def stay(number):
    Path(sys.argv[1], str(os.getpid())).touch()
    while len(os.listdir(sys.argv[1])) < 2:  # one worker must not do the work of both
        time.sleep(0.05)
if __name__ == "__main__":
    for _ in in_processes(stay, range(8), 2):
        time.sleep(60)
"""


def test_workers_of_a_killed_parent_end(tmp_path: Path) -> None:
    """They have nothing to do when the parent is killed, and would wait for their next piece for ever."""
    program, pids = tmp_path / "parent.py", tmp_path / "pids"
    program.write_text(ORPHANS)
    pids.mkdir()
    parent = subprocess.Popen([sys.executable, str(program), str(pids)])
    deadline = time.monotonic() + 150
    while len(list(pids.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    workers = [int(path.name) for path in pids.iterdir()]
    assert len(workers) == 2
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

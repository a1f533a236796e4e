"""Work in processes: no result is lost, the first error stops the work, threads do not multiply."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gasp_fast.processes import in_processes, usable_cores


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


def test_a_number_of_threads_set_by_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert sorted(in_processes(with_threads, range(4), 2)) == [(n, (n * n, "3")) for n in range(4)]
    assert os.environ["OMP_NUM_THREADS"] == "3"


def write_number_and_wait(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)


def is_running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from {Path(__file__).stem} import *\n"
        f"list(in_processes(write_number_and_wait, [{str(tmp_path)!r}] * 2, 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    end = time.monotonic() + 60
    while len(workers := [int(path.name) for path in tmp_path.iterdir()]) < 2:
        assert parent.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while any(map(is_running, workers)):
        assert time.monotonic() < end, "workers outlive their parent"
        time.sleep(0.1)


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

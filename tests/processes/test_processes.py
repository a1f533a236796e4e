"""Work in processes: no result is lost, the first error stops the work, threads do not multiply."""

from __future__ import annotations

import os
import signal

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

"""The cache of decoded frames is bounded, and works after a fork."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest

from gasp_fast.data.scenes.frame_cache import DECODED, FrameCache


def test_the_cache_stays_within_its_bound():
    store = FrameCache(limit_bytes=1000)
    for k in range(50):
        assert store.get(k, lambda k=k: np.full(25, k, np.int64))[0] == k
        assert store.held_bytes <= 1000
    store.get(49, lambda: pytest.fail("the last one is held"))
    store.get("big", lambda: np.zeros(4000, np.uint8))
    assert store.held_bytes <= 1000


def test_a_forked_worker_is_not_blocked_by_its_parents_threads():
    entered, released = threading.Event(), threading.Event()

    class Slow:
        """A key whose hash takes as long as the test needs, while the cache holds its lock."""

        def __hash__(self) -> int:
            entered.set()
            released.wait(60)
            return 0

    reader = threading.Thread(target=DECODED.get, args=(Slow(), lambda: np.zeros(1)))
    reader.start()
    entered.wait(60)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not the handler of the test runner
        signal.alarm(20)
        right = DECODED.get("forked", lambda: np.ones(3)).sum() == 3
        os._exit(0 if right else 1)
    released.set()
    reader.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

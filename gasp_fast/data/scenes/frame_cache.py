"""A cache of decoded frames, one per process, bounded in bytes.

Decoding a PNG takes a hundred times as long as computing one track in it, and the sequences drawn from one scene share
frames. So the most recently used frames stay decoded.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np

DEFAULT_BYTES = 256 << 20


class FrameCache:
    """Keeps the most recently used arrays, up to `limit_bytes` in total. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._arrays: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """The array under `key`; calls `decode` if the cache does not hold it. Read-only: all callers share it.

        Two threads that miss at the same time both decode. Holding the lock while decoding would cost more than this
        rare double work.
        """
        with self._lock:
            array = self._arrays.get(key)
            if array is not None:
                self._arrays.move_to_end(key)
                return array
        array = decode()
        array.setflags(write=False)
        with self._lock:
            if key not in self._arrays and array.nbytes <= self.limit_bytes:
                self._arrays[key] = array
                self.held_bytes += array.nbytes
                while self.held_bytes > self.limit_bytes:
                    _, dropped = self._arrays.popitem(last=False)
                    self.held_bytes -= dropped.nbytes
        return array

    def renew_lock(self) -> None:
        """Replaces the lock in a forked child, where a lock held by another thread of the parent is never released."""
        self._lock = threading.Lock()

    def resize(self, limit_bytes: int) -> None:
        """Changes the bound; 0 keeps nothing."""
        with self._lock:
            self.limit_bytes = limit_bytes
            while self.held_bytes > self.limit_bytes:
                _, dropped = self._arrays.popitem(last=False)
                self.held_bytes -= dropped.nbytes


# One cache per process, not per scene: a loader worker reads many scenes, which share its memory.
DECODED = FrameCache(DEFAULT_BYTES)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=DECODED.renew_lock)

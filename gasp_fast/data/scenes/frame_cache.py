"""A process-wide store of decoded frames, bounded in bytes.

Decoding a PNG costs a hundred times what a track through it costs, and the sequences drawn from one scene share
frames, so what was decoded last is kept. The store knows keys and arrays; it does not know files or scenes.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np


class FrameCache:
    """Least recently used arrays up to `limit_bytes`; every method may be called from any thread."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.hits = 0
        self.misses = 0
        self._arrays: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """The array under `key`, decoded now if it is not held. Read-only: all callers share it.

        Two threads that miss at once both decode: a lock held while decoding would cost more than the rare double work.
        """
        with self._lock:
            array = self._arrays.get(key)
            if array is not None:
                self._arrays.move_to_end(key)
                self.hits += 1
                return array
            self.misses += 1
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
        """For a forked child: a thread of the parent may have held the lock, and will never let go of it here."""
        self._lock = threading.Lock()

    def resize(self, limit_bytes: int) -> None:
        """Change the bound; 0 keeps nothing."""
        with self._lock:
            self.limit_bytes = limit_bytes
            while self.held_bytes > self.limit_bytes:
                _, dropped = self._arrays.popitem(last=False)
                self.held_bytes -= dropped.nbytes


# One store per process: a loader worker reads many scenes, and they compete for the same memory.
DECODED = FrameCache(limit_bytes=256 << 20)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=DECODED.renew_lock)

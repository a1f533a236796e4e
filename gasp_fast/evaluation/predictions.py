"""Predictions of a sequence, and their files, which make an evaluation resumable.

A folder `answers/` holds `plan.json`, the settings that the predictions depend on, and for each sequence one file
(`00000.npz`, ...), written atomically. An existing file is complete; one that cannot be read is computed again. The
folder is made with the first predictions, so an evaluation that fails before leaves nothing that refuses the next one.
"""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gasp_fast.data.errors import difference
from gasp_fast.files import read_json, replacing, write_atomically

from .metrics import Outcomes

VERSION = 1
FOLDER = "answers"
_SHARED = ("anchor", "target", "gap", "moved")
_BY_KIND = ("best", "correct", "confidence")


@dataclass(frozen=True)
class Predictions:
    """Predictions of all layers for the `M` correspondences of one sequence. Tokens count from the sequence's first."""

    anchor: NDArray[np.int64]  # [M], token of the query point
    target: NDArray[np.int64]  # [M], token of its true position in a later frame
    gap: NDArray[np.int64]  # [M], frames between the two
    moved: NDArray[np.bool_]  # [M], the two are further apart than the radius
    best: dict[str, NDArray[np.int32]]  # kind of features -> [L, M], predicted token; -1 where features are not finite
    correct: dict[str, NDArray[np.bool_]]  # [L, M]
    confidence: dict[str, NDArray[np.float32]]  # [L, M]; NaN where features are not finite

    @classmethod
    def empty(cls, layers: Mapping[str, int]) -> Predictions:
        """For a sequence without correspondences; `layers` is the number of layers of each kind of features."""
        none = np.zeros(0, np.int64)

        def by_kind(dtype: Any) -> dict[str, Any]:
            return {kind: np.zeros((count, 0), dtype) for kind, count in layers.items()}

        return cls(none, none, none, none.astype(bool), by_kind(np.int32), by_kind(bool), by_kind(np.float32))

    def __len__(self) -> int:
        return len(self.gap)

    def outcomes(self, kind: str) -> Outcomes:
        return Outcomes(self.correct[kind], self.confidence[kind], self.gap, self.moved)


class PredictionStore:
    """The prediction files of the evaluation in `out`, for some kinds of features."""

    def __init__(self, out: Path, kinds: Sequence[str]) -> None:
        self.out = out
        self._kinds = list(kinds)
        self._settings: dict[str, Any] = {}

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Begins an evaluation, or continues one that was begun with the same settings."""
        self._settings = json.loads(json.dumps({"version": VERSION, **settings}))
        path = self.out / FOLDER / "plan.json"
        if path.exists() and (change := difference(read_json(path), self._settings)):
            raise ValueError(
                f"{self.out} holds an evaluation with other settings ({change}); give another --out, or --fresh to "
                "start again"
            )

    def remove(self) -> None:
        shutil.rmtree(self.out / FOLDER, ignore_errors=True)

    def path(self, index: int) -> Path:
        return self.out / FOLDER / f"{index:05d}.npz"

    def save(self, index: int, predictions: Predictions) -> None:
        arrays: dict[str, Any] = {name: getattr(predictions, name) for name in _SHARED}
        for name in _BY_KIND:
            arrays.update({f"{name}.{kind}": array for kind, array in getattr(predictions, name).items()})
        path = self.out / FOLDER / "plan.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, (json.dumps(self._settings, indent=1) + "\n").encode())
        with replacing(self.path(index)) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def load(self, index: int) -> Predictions | None:
        """None if the sequence has no file yet, or a damaged one."""
        path = self.path(index)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                shared = [file[name] for name in _SHARED]
                by_kind = ({kind: file[f"{name}.{kind}"] for kind in self._kinds} for name in _BY_KIND)
                return Predictions(*shared, *by_kind)
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError):
            return None

    def load_all(self, sequences: int, left_out: Container[int] = ()) -> list[Predictions]:
        """The predictions of a finished evaluation; empty ones of the sequences that it left out."""
        loaded = []
        for index in range(sequences):
            if index in left_out:
                loaded.append(Predictions.empty(dict.fromkeys(self._kinds, 0)))
                continue
            if (predictions := self.load(index)) is None:
                raise OSError(f"{self.path(index)} cannot be read; run gasp-fast evaluate again")
            loaded.append(predictions)
        return loaded

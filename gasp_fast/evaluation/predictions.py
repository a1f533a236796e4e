"""Predictions of a sequence, and their files, which make an evaluation resumable.

A folder `answers/` holds `plan.json`, everything the predictions depend on, and one file `00000.npz`, ... for each
sequence, written atomically. A file that is there is complete; one that cannot be read is computed again.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gasp_fast.files import write_atomically

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
    best: dict[str, NDArray[np.int32]]  # kind of features -> [L, M], predicted token
    correct: dict[str, NDArray[np.bool_]]  # [L, M]
    confidence: dict[str, NDArray[np.float32]]  # [L, M]

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
    """The prediction files of one evaluation."""

    def __init__(self, out: Path, settings: Mapping[str, Any], kinds: Sequence[str]) -> None:
        """Creates the folder in `out`, or continues one that was created with the same settings."""
        self.folder = out / FOLDER
        self._kinds = list(kinds)
        self.folder.mkdir(parents=True, exist_ok=True)
        now = json.loads(json.dumps({"version": VERSION, **settings}))
        path = self.folder / "plan.json"
        if path.exists():
            before = json.loads(path.read_text())
            different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            if different:
                key = different[0]
                raise ValueError(
                    f"{out} holds an evaluation with other settings ({key}: {_short(before.get(key))} there, "
                    f"{_short(now.get(key))} now); give another --out, or --fresh to start again"
                )
        else:
            write_atomically(path, (json.dumps(now, indent=1) + "\n").encode())

    def save(self, index: int, predictions: Predictions) -> None:
        arrays: dict[str, Any] = {name: getattr(predictions, name) for name in _SHARED}
        for name in _BY_KIND:
            arrays.update({f"{name}.{kind}": array for kind, array in getattr(predictions, name).items()})
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        write_atomically(_path(self.folder, index), file.getvalue())

    def load(self, index: int) -> Predictions | None:
        """None if the sequence has no file yet, or a damaged one."""
        return _load(_path(self.folder, index), self._kinds)


def read_predictions(out: Path, kind: str, sequences: int) -> list[Predictions]:
    """The predictions of a finished evaluation in `out`, for one kind of features."""
    all_predictions = []
    for index in range(sequences):
        path = _path(out / FOLDER, index)
        predictions = _load(path, [kind])
        if predictions is None:
            raise OSError(f"{path} cannot be read; run gasp-fast evaluate again")
        all_predictions.append(predictions)
    return all_predictions


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.npz"


def _load(path: Path, kinds: Sequence[str]) -> Predictions | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            shared = [file[name] for name in _SHARED]
            return Predictions(*shared, *({kind: file[f"{name}.{kind}"] for kind in kinds} for name in _BY_KIND))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Answers on disk, one file a sequence: what makes an evaluation resumable.

A folder `answers/` with `plan.json` (everything the answers depend on) and `00000.npz`, …, each written under a
temporary name and renamed. A file that is there is finished; one that cannot be read is made again. Knows arrays and
files only.
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
_PLAIN = ("anchor", "target", "gap", "moved")
_BY_KIND = ("best", "correct", "confidence")


@dataclass(frozen=True)
class Answers:
    """All answers about one sequence. Tokens are counted over the frames of the sequence."""

    anchor: NDArray[np.int64]  # [M]
    target: NDArray[np.int64]  # [M]
    gap: NDArray[np.int64]  # [M]
    moved: NDArray[np.bool_]  # [M]
    best: dict[str, NDArray[np.int32]]  # kind -> [L, M], the token each layer chose
    correct: dict[str, NDArray[np.bool_]]  # [L, M]
    confidence: dict[str, NDArray[np.float32]]  # [L, M]

    @classmethod
    def none(cls, layers: Mapping[str, int]) -> Answers:
        """Of a sequence in which no point is seen again."""
        nobody = np.zeros(0, np.int64)

        def empty(dtype: Any) -> dict[str, Any]:
            return {kind: np.zeros((count, 0), dtype) for kind, count in layers.items()}

        return cls(nobody, nobody, nobody, nobody.astype(bool), empty(np.int32), empty(bool), empty(np.float32))

    def outcomes(self, kind: str) -> Outcomes:
        return Outcomes(self.correct[kind], self.confidence[kind], self.gap, self.moved)


class AnswerStore:
    """The answers of one evaluation."""

    def __init__(self, folder: Path, plan: Mapping[str, Any], kinds: Sequence[str]) -> None:
        """Begins a store, or takes up one that was begun with the very same plan."""
        self.folder = folder
        self._kinds = list(kinds)
        folder.mkdir(parents=True, exist_ok=True)
        now = json.loads(json.dumps({"version": VERSION, **plan}))
        path = folder / "plan.json"
        if path.exists():
            before = json.loads(path.read_text())
            different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            if different:
                key = different[0]
                raise ValueError(
                    f"{folder.parent} holds an evaluation with other settings ({key}: {_short(before.get(key))} there, "
                    f"{_short(now.get(key))} now); give another --out, or --fresh to begin anew"
                )
        else:
            write_atomically(path, (json.dumps(now, indent=1) + "\n").encode())

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.npz"

    def save(self, index: int, answers: Answers) -> None:
        arrays: dict[str, Any] = {name: getattr(answers, name) for name in _PLAIN}
        for name in _BY_KIND:
            arrays.update({f"{name}.{kind}": array for kind, array in getattr(answers, name).items()})
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        write_atomically(self._path(index), file.getvalue())

    def load(self, index: int) -> Answers | None:
        """None if the sequence has not been answered (or its file was damaged)."""
        return _load(self._path(index), self._kinds)


def read_answers(folder: Path, kind: str, sequences: int) -> list[Answers]:
    """All that a finished evaluation in `folder` answered, of one kind of features."""
    found = []
    for index in range(sequences):
        path = folder / "answers" / f"{index:05d}.npz"
        answers = _load(path, [kind])
        if answers is None:
            raise OSError(f"{path} cannot be read; run gasp-fast evaluate again")
        found.append(answers)
    return found


def _load(path: Path, kinds: Sequence[str]) -> Answers | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            plain = [file[name] for name in _PLAIN]
            return Answers(*plain, *({kind: file[f"{name}.{kind}"] for kind in kinds} for name in _BY_KIND))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

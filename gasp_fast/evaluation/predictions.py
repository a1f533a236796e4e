"""Predictions of a sequence, and their files, which make an evaluation resumable.

They hold tokens and positions, not scores: with another radius the same predictions are scored again.

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

from gasp_fast.backbones import TokenGrid
from gasp_fast.data.errors import difference
from gasp_fast.files import read_json, replacing, write_atomically

from .baselines import Answers
from .matching import is_causal
from .metrics import Outcomes, within
from .position_error import pixel_distance

VERSION = 2
FOLDER = "answers"
_SHARED = ("anchor", "target", "gap", "anchor_at", "target_at", "grids")


@dataclass(frozen=True)
class Predictions:
    """Predictions of all layers for the `M` correspondences of one sequence. Tokens count from the sequence's first.

    `best`, `confidence` and `groups` have an entry for each measured name: features in one direction.
    """

    anchor: NDArray[np.int64]  # [M], token of the query point
    target: NDArray[np.int64]  # [M], token of its true position in a later frame
    gap: NDArray[np.int64]  # [M], frames between the two
    anchor_at: NDArray[np.float32]  # [M, 2], the query point, in shares of its frame's width and height
    target_at: NDArray[np.float32]  # [M, 2], its true position
    grids: NDArray[np.float64]  # [F, 6], each frame's `TokenGrid`; its rectangle in shares of the frame's size
    best: dict[str, NDArray[np.int32]]  # [L, M], predicted token; -1 where features are not finite
    confidence: dict[str, NDArray[np.float32]]  # [L, M]; NaN where features are not finite
    groups: dict[str, NDArray[np.int32]]  # [L, G, M], predicted token of each head group; of `qk` only

    @classmethod
    def empty(cls, layers: Mapping[str, int]) -> Predictions:
        """For a sequence without correspondences; `layers` is the number of layers of each measured name."""
        none = np.zeros(0, np.int64)
        nowhere = np.zeros((0, 2), np.float32)
        best = {name: np.zeros((count, 0), np.int32) for name, count in layers.items()}
        confidence = {name: np.zeros((count, 0), np.float32) for name, count in layers.items()}
        return cls(none, none, none, nowhere, nowhere, np.zeros((0, 6)), best, confidence, {})

    def __len__(self) -> int:
        return len(self.gap)

    def token_grids(self) -> list[TokenGrid]:
        return [TokenGrid(int(columns), int(rows), *rectangle) for columns, rows, *rectangle in self.grids.tolist()]

    def correct(self, name: str, radius: float) -> NDArray[np.bool_]:
        """Whether each prediction is within `radius` patches of the true token, `[L, M]`."""
        return self._within(self.best[name], name, radius)

    def outcomes(self, name: str, radius: float) -> Outcomes:
        xy = self._token_xy()
        moved = ~within(xy[self.anchor], xy[self.target], radius)
        return Outcomes(self.correct(name, radius), self.confidence[name], self.gap, moved)

    def group_correct(self, name: str, radius: float) -> NDArray[np.bool_]:
        """Whether each prediction of each head group is correct, `[L, G, M]`."""
        return self._within(self.groups[name], name, radius)

    def answers(self, name: str) -> Answers:
        true, best, xy = self._true(name), self.best[name], self._token_xy()
        grids = self.token_grids()
        frame = np.searchsorted(np.cumsum([grid.tokens for grid in grids]), true, side="right")  # [M]
        sizes = np.array([(grid.rows, grid.columns) for grid in grids])  # [F, 2]
        return Answers(sizes[frame], xy[true], np.where(best[..., None] < 0, -1, xy[best]))

    def distances(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Pixels at 256 x 256 from the true position, of the predictions' centres `[L, M]` and the true tokens' `[M]`.

        NaN where there is no prediction.
        """
        centres = np.concatenate([grid.centres() for grid in self.token_grids()])  # [N, 2]
        at = self.anchor_at if is_causal(name) else self.target_at
        distance = pixel_distance(centres[self.best[name]], at)
        return np.where(self.best[name] < 0, np.nan, distance), pixel_distance(centres[self._true(name)], at)

    def _true(self, name: str) -> NDArray[np.int64]:
        return self.anchor if is_causal(name) else self.target

    def _token_xy(self) -> NDArray[np.int64]:
        return np.concatenate([grid.xy() for grid in self.token_grids()])  # [N, 2], column and row

    def _within(self, best: NDArray[np.int32], name: str, radius: float) -> NDArray[np.bool_]:
        xy = self._token_xy()
        return within(xy[best], xy[self._true(name)], radius) & (best >= 0)


class PredictionStore:
    """The prediction files of the evaluation in `out`, for some measured names."""

    def __init__(self, out: Path, names: Sequence[str]) -> None:
        self.out = out
        self._names = list(names)
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
        for field in ("best", "confidence", "groups"):
            arrays.update({f"{field}.{name}": array for name, array in getattr(predictions, field).items()})
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
                shared = {name: file[name] for name in _SHARED}
                best = {name: file[f"best.{name}"] for name in self._names}
                confidence = {name: file[f"confidence.{name}"] for name in self._names}
                groups = {name: file[f"groups.{name}"] for name in self._names if f"groups.{name}" in file}
                return Predictions(**shared, best=best, confidence=confidence, groups=groups)
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError):
            return None

    def load_all(self, sequences: int, left_out: Container[int] = ()) -> list[Predictions]:
        """The predictions of a finished evaluation; empty ones of the sequences that it left out."""
        loaded = []
        for index in range(sequences):
            if index in left_out:
                loaded.append(Predictions.empty(dict.fromkeys(self._names, 0)))
                continue
            if (predictions := self.load(index)) is None:
                raise OSError(f"{self.path(index)} cannot be read; run gasp-fast evaluate again")
            loaded.append(predictions)
        return loaded

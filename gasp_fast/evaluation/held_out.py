"""Correspondence of a model that is being trained, on a few held-out sequences.

The sequences, predictions and metrics are those of `gasp-fast evaluate`, for one kind of features. A sequence is run by
itself, so that the numbers do not depend on how the sequences are divided among processes. Its frames and tracks are
read once and stay in memory.

The training loop uses this class through the protocol `HeldOutSequences` of `gasp_fast/training/held_out.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gasp_fast.backbones import Backbone
from gasp_fast.collator import Collator, CollatorConfig, Sample
from gasp_fast.data.errors import one_line
from gasp_fast.loss.config import LossConfig
from gasp_fast.loss.function import PCK_RADIUS
from gasp_fast.supervision.heads import CorrespondenceHeads

from .dataset import EvaluationSet, EvaluationSetConfig
from .evaluated_model import EvaluatedModel
from .features import Kind, layers_with
from .metrics import Outcomes, summary
from .predict import Predictor


class SequencesInMemory:
    """Held-out sequences by index. If there are several folders of scenes, sequences alternate between them."""

    def __init__(self, folders: Sequence[tuple[Path, EvaluationSetConfig]], kind: Kind) -> None:
        self.kind = kind
        self.sets = [EvaluationSet(folder, config) for folder, config in folders]
        self.unreadable = [scene for one in self.sets for scene in one.unreadable]  # names and reasons
        self._samples: dict[int, Sample] = {}

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    def usable(self, backbone: Backbone, indices: Iterable[int]) -> list[int]:
        """Read sequences, and return those that can be evaluated. The others are named on stderr."""
        chosen = []
        collate = Collator(backbone, CollatorConfig(anchors="first"))
        for index in indices:
            try:
                if not (tracked := self._read(index).tracks) or not len(collate([self._samples[index]])["matches"]):
                    reason = "no query point is visible in a second frame"
                    raise ValueError(f"{reason}, or none has a token there" if tracked else reason)
                chosen.append(index)
            except (OSError, ValueError) as error:
                self._samples.pop(index, None)
                data, number = self._place(index)
                name = data.library / data.scene_entry(number).name
                print(f"evaluate.scenes: sequence {index}, of {name}: left out: {one_line(error)}", file=sys.stderr)
        return chosen

    def outcomes(
        self,
        backbone: Backbone,
        model: nn.Module,
        heads: CorrespondenceHeads | None,
        indices: Sequence[int],
        device: torch.device,
    ) -> dict[int, Outcomes]:
        """Run the model once for each of `indices`, also for repeated ones. It must be in evaluation mode."""
        origin = None if heads is None else "trained"
        present = EvaluatedModel("present", backbone, model, heads, origin, "", computes_on=device)
        predict = Predictor(present, [self.kind], "before", LossConfig.temperature)
        outcomes = {}
        for index in indices:
            data, number = self._place(index)
            (predictions,) = predict([data.frames(number)], [self._read(index)])
            outcomes[index] = predictions.outcomes(self.kind, PCK_RADIUS)
        self._layers = [layer + 1 for layer in layers_with(self.kind, backbone, heads)]
        return outcomes

    def metrics(self, outcomes: Mapping[int, Outcomes]) -> dict[str, Any]:
        """The report's numbers: `pck`, the mean over layers; `peak`, `moved` and `rho` of the best layer; all layers'.

        Undefined numbers are None.
        """
        in_order = [outcomes[index] for index in sorted(outcomes)]
        facts = {"features": self.kind, "sequences": len(in_order), "layers": self._layers}
        undefined = [np.isnan(one.confidence).any(1) for one in in_order]  # [L] each
        if np.any(undefined, axis=0).all():  # no layer's features are finite
            names = ("pck", "peak", "peak_layer", "moved", "rho", "identity")
            rows = ("pck_per_layer", "moved_per_layer", "rho_per_layer")
            return {**facts, **dict.fromkeys(names), **dict.fromkeys(rows, [None] * len(self._layers))}
        found = summary(in_order, self._layers, max(one.config.max_gap for one in self.sets))
        best = self._layers.index(found["pck"]["peak_layer"])
        return {
            **facts,
            "pck": found["pck"]["mean"],
            "peak": found["pck"]["peak"],
            "peak_layer": found["pck"]["peak_layer"],
            "moved": found["pck_moved"]["per_layer"][best],
            "rho": found["rho"]["per_layer"][best],
            "identity": found["identity"],
            "pck_per_layer": found["pck"]["per_layer"],
            "moved_per_layer": found["pck_moved"]["per_layer"],
            "rho_per_layer": found["rho"]["per_layer"],
        }

    def _place(self, index: int) -> tuple[EvaluationSet, int]:
        """The set that has a sequence, and its number there."""
        number, at = divmod(index, len(self.sets))
        return self.sets[at], number

    def _read(self, index: int) -> Sample:
        if index not in self._samples:
            data, number = self._place(index)
            self._samples[index] = data.sample(number)
        return self._samples[index]

"""Sequences of the joint stage: frames of scenes that records of `make-vqa` are about, with questions and answers.

The questions count a record's frames, so a sequence has all of them, in their order. A step takes records with equally
many frames. How many is that of a record drawn from all, so that every record is as likely as any other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from gasp_fast.backbones import messages_from_record
from gasp_fast.backbones.frames import RGBImage
from gasp_fast.data.questions.scene_frames import FrameReader, SceneFrames
from gasp_fast.data.questions.video_qa import VideoQA
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.loss.matches import Matches
from gasp_fast.training.replacing import Replacing
from gasp_fast.training.skipped import Skipped

from .data_config import G2DataConfig, PackShape, shape_of_step
from .samples import GeometrySample, geometry_sample

MatchesOf = Callable[[Scene, Sequence[int], Sequence[RGBImage]], Matches]  # of frames of a scene, and their photographs


class QuestionSequences(Replacing[GeometrySample]):
    """The records with one number of frames."""

    kinds = ("question",)
    advice = ""

    def __init__(
        self,
        config: G2DataConfig,
        records: VideoQA,
        numbers: NDArray[np.int64],
        shape: Callable[[int], PackShape],
        matches_of: MatchesOf | None,
    ) -> None:
        """`numbers` are those of its records among all; `shape` gives the shape at a position."""
        self.config, self.records, self.numbers, self.shape = config, records, numbers, shape
        self.matches_of = matches_of
        self.root = config.questions

    def __len__(self) -> int:
        return len(self.numbers)

    def load(self, epoch: int, index: int, position: int) -> GeometrySample:
        record, shape = self.records.record(int(self.numbers[index])), self.shape(position)
        reader = self.records.reader
        assert reader is not None and isinstance(record.about, SceneFrames)
        photographs = reader.read(record.about)
        scene = reader.scenes[record.about.scene]
        size = shape.height, shape.width
        sample = geometry_sample(scene, record.about.frames, size, max_depth=self.config.max_depth)
        turns = [{"from": turn.speaker, "value": turn.text} for turn in record.turns]
        normals = not self.config.with_normals or self.config.with_normals[0]
        messages = messages_from_record(turns)
        found = None if self.matches_of is None else self.matches_of(scene, record.about.frames, photographs)
        return replace(sample, photographs=photographs, messages=messages, with_normals=normals, matches=found)

    def name(self, index: int) -> str:
        return self.records.name(int(self.numbers[index]))


class QuestionStream(Dataset[GeometrySample]):
    """Sequences with questions, by position. Pickles into loader workers."""

    def __init__(self, config: G2DataConfig, batch_size: int, matches_of: MatchesOf | None = None) -> None:
        """`batch_size` is the number of sequences of a step, over all processes.

        `matches_of` finds their matches, for GASP's supervision; None: they have none.
        """
        if not config.questions or not config.roots:
            raise ValueError(
                "data.questions names no folder of records, or data.roots[0] not the scenes they are about"
            )
        self.config, self.batch_size = config, batch_size
        self.records = VideoQA(Path(config.questions), (), FrameReader(Path(config.roots[0]), config.held_out))
        faults = self.records.skipped.items()
        self.remarks = list[str]()
        self.left_out = [Skipped("question", f"{config.questions}/{name}", reason) for name, reason in faults]
        self.found = len(self.records) + len(self.left_out)
        counts = np.array([self._frames_of(number) for number in range(len(self.records))])
        self.usable = np.flatnonzero((counts >= config.min_frames) & (counts <= config.max_frames))
        if not len(self.usable):
            raise ValueError(
                f"data.questions = {config.questions!r}: no record has data.min_frames = {config.min_frames} to "
                f"data.max_frames = {config.max_frames} frames; they have {counts.min()} to {counts.max()}"
            )
        self.groups = {
            int(count): QuestionSequences(config, self.records, np.flatnonzero(counts == count), self.shape, matches_of)
            for count in np.unique(counts[self.usable])
        }

    @property
    def sources(self) -> dict[str, QuestionStream]:
        """It is its only source."""
        return {"questions": self}

    def __len__(self) -> int:
        return len(self.usable)

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        return {self.config.questions: {"records": len(self), "digest": self.records.digest()}}

    def shape_of_step(self, step: int) -> PackShape:
        number = random.Random(f"questions/{self.config.seed}/{step}").random() * len(self.usable)
        return shape_of_step(self.config, step, self._frames_of(int(self.usable[int(number)])))

    def shape(self, position: int) -> PackShape:
        return self.shape_of_step(position // self.batch_size)

    def __getitem__(self, position: int) -> GeometrySample:
        """The sample at a position. If it cannot be used, another one with as many frames is in its place."""
        group, index = self._draw(position)
        sample, _, skipped = group.first_usable(0, index, position)
        return replace(sample, skipped=skipped)

    def describe(self, position: int) -> str:
        """Name the sample at a position, for messages."""
        group, index = self._draw(position)
        return f"{group.root}/{group.name(index)}"

    def _draw(self, position: int) -> tuple[QuestionSequences, int]:
        group = self.groups[self.shape(position).frames]
        uniform = random.Random(f"question/{self.config.seed}/{position}").random()
        return group, int(uniform * len(group))

    def _frames_of(self, number: int) -> int:
        about = self.records.record(number).about
        assert isinstance(about, SceneFrames)
        return len(about.frames)

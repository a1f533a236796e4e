"""Questions and answers about videos, in the schema of LLaVA-Video-178K, or about frames of scenes.

A root holds JSON lists of `{id, conversations: [{from, value}], data_source, video}`, directly or in "config" folders
(`0_30_s_academic_v0_1`, …); `video` is relative to the JSON's folder, or else to the root. If a folder of videos is
stated, it is relative to that first, or absolute and inside of it. `messages` are read like `conversations` (see
`messages.py`). The records of `make-vqa`
have `images` in place of `video`: the fields of a `SceneFrames`. The dataset has over a million records, so they are
stored as one block of bytes, which loader workers share (`shared_bytes.py`), and one array of offsets.

Collections of this size contain damaged files. An invalid record is skipped at loading, and named.

A text with a control token of a language model (`<|im_start|>`, `<|image_pad|>`) is invalid: tokenized, it would end
the turn that contains it, or stand for a frame that is not there.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gasp_fast.data.errors import reading, shown
from gasp_fast.data.video.read import read_video
from gasp_fast.files import parse_json, read_json

from .messages import with_conversations
from .scene_frames import FrameReader, SceneFrames
from .shared_bytes import SharedBytes

LONGEST_TEXT = 1 << 20  # characters of a turn: more than any model takes, and a second of work for a tokenizer
CONTROL_TOKEN = re.compile(r"<\|\w{1,40}\|>")
SPEAKERS = ("human", "gpt")  # by turns, the human first


@dataclass(frozen=True)
class Turn:
    """One utterance. The first one of the human contains `<image>` at the place of the frames."""

    speaker: str  # "human" | "gpt"
    text: str


@dataclass(frozen=True)
class QARecord:
    """One conversation about one video, or about frames of one scene."""

    id: str
    turns: tuple[Turn, ...]
    about: str | SceneFrames  # a video's path, relative to the folder of its JSON or to the root; or frames of a scene

    @classmethod
    def from_json(cls, fields: Any) -> QARecord:
        """Validates a record; an invalid one is a `ValueError` in a few words."""
        if not isinstance(fields, dict):
            raise ValueError("not an object")
        names_frames = "images" in fields and "video" not in fields
        about = SceneFrames.from_json(fields["images"]) if names_frames else _video_of(fields)
        talk = fields.get("conversations")
        if not isinstance(talk, list) or len(talk) < 2:
            raise ValueError("has no conversation")
        turns = []
        for place, turn in enumerate(talk):
            speaker = SPEAKERS[place % 2]
            if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
                raise ValueError(f"turn {place} of the conversation is not from {speaker}")
            if len(turn["value"]) > LONGEST_TEXT:
                raise ValueError(f"turn {place} of the conversation has over {LONGEST_TEXT:,} characters")
            if token := CONTROL_TOKEN.search(turn["value"]):
                raise ValueError(f"turn {place} of the conversation contains the control token {token[0]}")
            turns.append(Turn(speaker, turn["value"]))
        if not all(turn.text.strip() for turn in turns if turn.speaker == "gpt"):
            raise ValueError("has an empty answer")
        identity = fields.get("id", "")
        if not isinstance(identity, str | int | float):
            raise ValueError(f"id = {shown(identity)} is neither text nor a number")
        return cls(str(identity), tuple(turns), about)

    def to_json(self) -> bytes:
        """UTF-8; a `ValueError` for half of a surrogate pair, which no tokenizer takes."""
        fields = record_json(self.id, [turn.text for turn in self.turns], "", self.about)
        return json.dumps(fields, ensure_ascii=False).encode()


def record_json(identity: str, texts: Sequence[str], data_source: str, about: str | SceneFrames) -> dict[str, Any]:
    """A record in the schema; `texts` are alternately questions and answers."""
    talk = [{"from": SPEAKERS[place % 2], "value": text} for place, text in enumerate(texts)]
    visual = {"video": about} if isinstance(about, str) else {"images": about.to_json()}
    return {"id": identity, "conversations": talk, "data_source": data_source, **visual}


def _video_of(fields: dict[str, Any]) -> str:
    video = fields.get("video")
    if not isinstance(video, str) or not video:
        raise ValueError("names no video")
    if PurePosixPath(video).is_absolute() or ".." in PurePosixPath(video).parts:
        raise ValueError(f"video {video!r} leads out of its folder; data.qa.videos names a folder of videos elsewhere")
    return video


@dataclass(frozen=True)
class QASample:
    """A record with its frames."""

    record: QARecord
    frames: NDArray[np.uint8] | list[NDArray[np.uint8]]  # F times [H, W, 3]


@dataclass
class VideoQA:
    """All records under a root, by number. `configs` are the folders to read; by default all with JSON lists.

    `videos` is a folder in which videos lie, beside the root; absolute paths must lead into it.
    With a `reader` they are about frames of scenes, without one about videos; others are skipped.
    """

    root: Path
    configs: Sequence[str] = ()
    reader: FrameReader | None = None
    videos: Path | None = None
    skipped: dict[str, str] = field(default_factory=dict)  # names of records skipped at loading, with the reason
    broken: dict[str, str] = field(default_factory=dict)  # paths of videos that could not be read, with the reason

    def __post_init__(self) -> None:
        self.root = Path(self.root)
        self._files = self._lists()
        places: list[tuple[int, int]] = []
        ends = [0]

        def records() -> Iterator[bytes]:
            for file, path in enumerate(self._files):
                for number, record in self._read_list(path):
                    places.append((file, number))
                    ends.append(ends[-1] + len(record))
                    yield record

        self._text = SharedBytes(records())
        if not places and not self.skipped:
            raise ValueError(f"{self.root}: no record is left; all are about scenes that are held out")
        if not places:
            first = "".join(f"; the first: {name}: {reason}" for name, reason in islice(self.skipped.items(), 1))
            raise ValueError(f"{self.root}: none of {len(self.skipped)} records can be used{first}")
        self._offsets: NDArray[np.int64] = np.array(ends)
        self._places: NDArray[np.int32] = np.array(places, np.int32)  # [records, 2]: file, number in it

    def __len__(self) -> int:
        return len(self._places)

    def record(self, index: int) -> QARecord:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.root}, which has {len(self)}")
        return QARecord.from_json(json.loads(self._text[self._offsets[index] : self._offsets[index + 1]]))

    def video_path(self, index: int) -> Path:
        """The path of a record's video, which may not exist."""
        video = self.record(index).about
        assert isinstance(video, str)
        beside = self._files[self._places[index, 0]].parent
        folders = [self.videos, beside] if self.videos is not None else [beside]
        return next((folder / video for folder in folders if os.path.exists(folder / video)), self.root / video)

    def name(self, index: int) -> str:
        """The file of a record and its number there, for messages."""
        file, number = self._places[index]
        return f"{self._files[file].relative_to(self.root)}[{number}]"

    def digest(self) -> str:
        """A hash of all records. Opens no video."""
        return blake2b(self._text.view(), digest_size=16).hexdigest()

    def sample(
        self, index: int, frames: int | None = 16, timeout: float = 30.0, longest_side: int | None = None
    ) -> QASample:
        """Record `index` with its frames: evenly spread ones of a video, or all that it names of a scene.

        An unreadable video is an `OSError`, and not tried again. The other arguments are for videos only.
        """
        record = self.record(index)
        if isinstance(record.about, SceneFrames):
            assert self.reader is not None
            return QASample(record, self.reader.read(record.about))
        assert frames is not None
        path = self.video_path(index)
        if reason := self.broken.get(str(path)):
            raise OSError(reason)
        try:
            images = read_video(path, frames, timeout=timeout, longest_side=longest_side)
        except OSError as error:
            self.broken[str(path)] = str(error)
            raise
        return QASample(record, images)

    def _lists(self) -> list[Path]:
        if not self.root.is_dir():
            raise OSError(f"{self.root}: no such folder")
        if self.configs:
            missing = [name for name in self.configs if not (self.root / name).is_dir()]
            if missing:
                raise OSError(f"{self.root}: has no config {missing[0]!r}")
            folders = [self.root / name for name in self.configs]
        else:
            folders = [self.root, *sorted(path for path in self.root.iterdir() if path.is_dir())]
        lists = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jsonl")]
        if not lists:
            raise OSError(f"{self.root}: no JSON lists of questions here or one folder below")
        return lists

    def _read_list(self, path: Path) -> Iterator[tuple[int, bytes]]:
        """The valid records of one file, as JSON, with their numbers."""
        lines = path.suffix == ".jsonl"
        if lines:
            with reading(path, "questions"):
                records: Any = [line for line in path.read_bytes().splitlines() if line.strip()]
        else:
            records = read_json(path, largest=math.inf)
        if not isinstance(records, list):
            raise ValueError(f"{path}: holds {type(records).__name__}, not a list of records")
        for number, fields in enumerate(records):
            try:
                record = QARecord.from_json(self._in_schema(parse_json(fields, "line") if lines else fields))
                if not self._leaves_out(record):
                    yield number, record.to_json()
            except ValueError as error:
                self.skipped[f"{path.relative_to(self.root)}[{number}]"] = str(error)

    def _in_schema(self, fields: Any) -> Any:
        """The record with `conversations`, and a path relative to `videos` in place of an absolute one inside it."""
        if isinstance(fields, dict) and "messages" in fields and "conversations" not in fields:
            fields = with_conversations(fields)
        video = fields.get("video") if isinstance(fields, dict) else None
        if self.videos is None or not isinstance(video, str) or not PurePosixPath(video).is_absolute():
            return fields
        folder, path = os.path.abspath(self.videos), os.path.normpath(video)
        if not path.startswith(os.path.join(folder, "")):
            raise ValueError(f"video {shown(video)} is not in {self.videos}")
        return {**fields, "video": os.path.relpath(path, folder)}

    def _leaves_out(self, record: QARecord) -> bool:
        """Whether a valid record is of a scene that is held out. Raises if it is of the other kind."""
        if isinstance(record.about, str):
            if self.reader is not None:
                raise ValueError("names a video; give the number of its frames to take")
            return False
        if self.reader is None:
            raise ValueError("names frames of a scene; take all of them with frames: null")
        return self.reader.leaves_out(record.about)

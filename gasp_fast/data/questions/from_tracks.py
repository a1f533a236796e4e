"""The fairness baseline: turns the tracks that supervise GASP into questions and answers.

To claim that a geometric loss helps, one must show that the same geometry as ordinary training text does not help as
much. So every annotated sequence becomes one record in the schema of LLaVA-Video-178K: a few questions whose answers
follow from its tracks. The record names the frames instead of a video (`scene_frames.py`), so the model sees the same
pixels as in the sequence. The tracks and the number of samples are the same, too.

Images are counted from 1. Positions are whole numbers from [0, 0] at the top left to [1000, 1000] at the bottom right
of what the model sees of an image, separately for each axis, so a processor's resizing does not change them. What its
crop removes, it does not see: a point there counts as not visible.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from gasp_fast.data.annotations.parts import shards_in_part
from gasp_fast.data.annotations.read import AnnotationReader
from gasp_fast.data.scenes.library import SceneEntry, check_unchanged
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import Order, Tracks
from gasp_fast.files import sweep_partials, write_atomically
from gasp_fast.processes import in_processes

from .scene_frames import Rectangle, SceneFrames
from .video_qa import record_json

SOURCE = "gasp_tracks_as_vqa"
ABOUT_FILE = "about.txt"  # not .json: `VideoQA` reads every .json file as a list of records
PREFACE = (
    "These are {count} images of one place. A position is [x, y], from [0, 0] at the top left of an image to "
    "[1000, 1000] at its bottom right."
)
MOST_TURNS = 64
LEAST_DISTANCE = 80  # thousandths between two positions to choose from
LEAST_DEPTH_RATIO = 1.15  # of two points, for the question which one is nearer


@dataclass(frozen=True, kw_only=True)
class VQAConfig:
    """Parameters of the questions."""

    turns: int = 4  # questions per sequence
    order: Order = "anchor_first"  # of a sequence's frames, as in data.scenes.order
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.turns <= MOST_TURNS:
            raise ValueError(f"turns = {self.turns}: 1 to {MOST_TURNS} questions per sequence")
        if self.order not in get_args(Order):
            raise ValueError(f"order = {self.order!r} is unknown; choose one of {', '.join(get_args(Order))}")


def whole_frame(width: int, height: int) -> Rectangle:
    return 0.0, 0.0, float(width), float(height)


@dataclass(frozen=True)
class View:
    """What a model sees of a frame. Pickles into worker processes."""

    model: str = ""  # its name, for messages
    rectangle: Callable[[int, int], Rectangle] = whole_frame  # in pixels of a frame of this width and height


@dataclass(frozen=True)
class TrackQuestion:
    """A question and its answer."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class TrackTable:
    """Tracks of points that are seen in the query image, with positions in thousandths of what is seen of an image."""

    position: NDArray[np.int64]  # [T, F, 2]
    visible: NDArray[np.bool_]  # [T, F], seen in the image and not occluded
    depth: NDArray[np.floating]  # [T, F]
    query: int  # the image, counted from 0, in which the tracks begin

    @classmethod
    def of(cls, tracks: Tracks, seen: Sequence[Rectangle]) -> TrackTable:
        """`seen` has a rectangle for each image, in its pixels."""
        left_top, right_bottom = np.array(seen)[:, :2], np.array(seen)[:, 2:]  # [F, 2]
        share = (tracks.uv - left_top) / (right_bottom - left_top)  # [T, F, 2]
        visible = tracks.visible & ((share >= 0) & (share < 1)).all(-1)
        asked = visible[:, tracks.query_frame]
        position = np.clip(np.rint(share * 1000), 0, 1000).astype(np.int64)
        return cls(position[asked], visible[asked], tracks.depth[asked], tracks.query_frame)

    def pick(self, rng: np.random.Generator, allowed: NDArray[np.bool_]) -> tuple[int, int] | None:
        """A random track and image, not the query's, where `allowed` [T, F] is true; None if there is none."""
        tracks, images = np.nonzero(allowed & (np.arange(allowed.shape[1]) != self.query))
        if not len(tracks):
            return None
        chosen = int(rng.integers(len(tracks)))
        return int(tracks[chosen]), int(images[chosen])

    def beginning(self, track: int) -> str:
        """Where a track begins, such as "[10, 20] in image 1"."""
        return f"{_text(self.position[track, self.query])} in image {self.query + 1}"


# ---- the kinds of questions: each function returns one, or None if the tracks do not allow it -----------------------


def _point(table: TrackTable, rng: np.random.Generator) -> TrackQuestion | None:
    if (picked := table.pick(rng, table.visible)) is None:
        return None
    track, image = picked
    question = (
        f"A point lies at {table.beginning(track)}. Where does the same point lie in image {image + 1}? Give the "
        "[x, y] position."
    )
    return TrackQuestion("point", question, _text(table.position[track, image]))


def _visible(table: TrackTable, rng: np.random.Generator) -> TrackQuestion | None:
    yes = bool(rng.integers(2))
    picked = table.pick(rng, table.visible == yes)
    if picked is None:
        return None
    track, image = picked
    question = f"A point lies at {table.beginning(track)}. Can it be seen in image {image + 1}?"
    return TrackQuestion("visible", question, "Yes" if yes else "No")


def _nearer(table: TrackTable, rng: np.random.Generator) -> TrackQuestion | None:
    if (picked := table.pick(rng, table.visible)) is None:
        return None
    first, image = picked
    ratio = np.maximum(table.depth[:, image], 1e-9) / table.depth[first, image]
    others = np.flatnonzero(table.visible[:, image] & (np.abs(np.log(ratio)) > np.log(LEAST_DEPTH_RATIO)))
    if not len(others):
        return None
    second = int(rng.choice(others))
    question = (
        f"Point A lies at {table.beginning(first)}, point B at {table.beginning(second)}. "
        f"Which of the two is nearer to the camera in image {image + 1}?"
    )
    return TrackQuestion("nearer", question, "A" if ratio[second] > 1 else "B")


def _choose(table: TrackTable, rng: np.random.Generator) -> TrackQuestion | None:
    """Four positions, one of them right; the others are of other tracks, or random ones if there are too few."""
    if (picked := table.pick(rng, table.visible)) is None:
        return None
    track, image = picked
    positions = [table.position[track, image]]
    others = rng.permutation(np.flatnonzero(table.visible[:, image]))
    for position in [*table.position[others, image], *rng.integers(40, 961, (200, 2))]:
        if len(positions) < 4 and all(np.hypot(*(position - other)) >= LEAST_DISTANCE for other in positions):
            positions.append(position)
    letters = rng.permutation(list("ABCD"[: len(positions)]))
    choices = ", ".join(sorted(f"{letter} {_text(at)}" for letter, at in zip(letters, positions, strict=True)))
    question = (
        f"A point lies at {table.beginning(track)}. Which position in image {image + 1} is the same point: {choices}? "
        "Answer with its letter."
    )
    return TrackQuestion("choose", question, str(letters[0]))


KINDS: dict[str, Callable[[TrackTable, np.random.Generator], TrackQuestion | None]] = {
    "point": _point,
    "choose": _choose,
    "visible": _visible,
    "nearer": _nearer,
}


def draw_questions(table: TrackTable, rng: np.random.Generator, count: int) -> list[TrackQuestion]:
    """Up to `count` different questions, the kinds in turn."""
    order = [str(kind) for kind in rng.permutation(list(KINDS))]
    questions: list[TrackQuestion] = []
    for attempt in range(4 * count):
        if len(questions) < count:
            new = KINDS[order[attempt % len(order)]](table, rng)
            if new is not None and all(new.question != other.question for other in questions):
                questions.append(new)
    return questions


def _text(position: NDArray[np.int64]) -> str:
    return f"[{position[0]}, {position[1]}]"


# ---- records --------------------------------------------------------------------------------------------------------


def make_vqa(
    library: Path,
    annotations: Path,
    out: Path,
    config: VQAConfig | None = None,
    workers: int = 1,
    part: tuple[int, int] = (0, 1),
    view: View | None = None,
) -> Iterator[int]:
    """Writes records of all annotated sequences, and yields the number of each shard once it exists.

    `view` is the model's; by default it sees whole frames. Shards, parts and resuming are those of the annotations.
    """
    config, view = config or VQAConfig(), view or View()
    reader = AnnotationReader(annotations)
    settings = reader.settings
    reader.check_complete(shards_in_part(settings.shards, part))
    about = {"annotations": settings.digest, **asdict(config), "model": view.model}
    content = (json.dumps(about, indent=1) + "\n").encode()
    out.mkdir(parents=True, exist_ok=True)
    if (out / ABOUT_FILE).exists() and (out / ABOUT_FILE).read_bytes() != content:
        raise ValueError(f"{out} was made from other annotations or with other settings; give another --out")
    write_atomically(out / ABOUT_FILE, content)
    missing = []
    for number in shards_in_part(settings.shards, part):
        if records_path(out, number).exists():
            yield number
        else:
            missing.append(number)
            sweep_partials(records_path(out, number))
    for number, _ in in_processes(partial(write_shard, library, annotations, out, config, view), missing, workers):
        yield number


def records_path(out: Path, number: int) -> Path:
    return out / f"records-{number:05d}.json"


def omitted_path(out: Path, number: int) -> Path:
    return out / f"omitted-{number:05d}.txt"


def write_shard(library: Path, annotations: Path, out: Path, config: VQAConfig, view: View, number: int) -> None:
    """Writes the records of one shard; `omitted-….txt` lists sequences without a record, and why."""
    reader = AnnotationReader(annotations)
    entries = {entry.name: entry for entry in reader.settings.scenes}

    @lru_cache(maxsize=1)  # consecutive sequences share a scene
    def open_once(name: str) -> Scene:
        scene = open_scene(library / name)
        check_unchanged(scene, entries[name])
        return scene

    records, omitted = [], []
    for index in reader.settings.sequences_in_shard(number):
        name, tracks = reader[index].scene, reader[index].tracks
        try:
            records.append(_record(open_once(name), entries[name], tracks, config, view, index))
        except (OSError, ValueError) as error:
            omitted.append(f"{index} {name}: {error}".replace(f"{library}{os.sep}", ""))
    if omitted:
        write_atomically(omitted_path(out, number), ("\n".join(omitted) + "\n").encode())
    write_atomically(records_path(out, number), (json.dumps(records, indent=1) + "\n").encode())


def _record(
    scene: Scene, entry: SceneEntry, tracks: Tracks, config: VQAConfig, view: View, index: int
) -> dict[str, Any]:
    """The record of sequence `index`. Reads the sizes of its frames only."""
    if config.order == "chronological":
        tracks = tracks.in_temporal_order()
    seen = [view.rectangle(*scene.image_size(int(frame))) for frame in tracks.frames]
    questions = draw_questions(TrackTable.of(tracks, seen), np.random.default_rng([config.seed, index]), config.turns)
    if not questions:
        raise ValueError("no track gives a question")
    texts = [text for question in questions for text in (question.question, question.answer)]
    texts[0] = f"<image>\n{PREFACE.format(count=len(tracks.frames))}\n{texts[0]}"
    frames = SceneFrames(entry.name, entry.digest, tuple(tracks.frames.tolist()), seen[0])
    return record_json(f"{index:08d}", texts, SOURCE, frames)

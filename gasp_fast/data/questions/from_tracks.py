"""The fairness baseline: turns the tracks that supervise GASP into questions and answers.

To claim that a geometric loss helps, one must show that the same geometry as ordinary training text does not help as
much. So every annotated sequence becomes one record in the schema of LLaVA-Video-178K: its frames as a clip, and a few
questions whose answers follow from its tracks. The frames, the tracks and the number of samples are the same.

Images are counted from 1, the anchor first. Positions are whole numbers from [0, 0] at the top left to [1000, 1000] at
the bottom right of an image, separately for each axis, so a processor's resizing does not change them. Questions of the
kind "choose" have labels drawn into the images, as in BLINK's visual correspondence; no other kind changes a pixel.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gasp_fast.data.annotations.parts import shards_in_part
from gasp_fast.data.annotations.read import AnnotationReader
from gasp_fast.data.scenes.library import check_unchanged
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import Tracks
from gasp_fast.data.video.write import write_clip
from gasp_fast.files import sweep_partials, write_atomically
from gasp_fast.processes import in_processes

from .video_qa import record_json

SOURCE = "gasp_tracks_as_vqa"
ABOUT_FILE = "about.txt"  # not .json: `VideoQA` reads every .json file as a list of records
PREFACE = (
    "The clip shows {count} images of one place. A position is [x, y], from [0, 0] at the top left of an image to "
    "[1000, 1000] at its bottom right."
)
MOST_TURNS = 64
LEAST_DISTANCE = 80  # thousandths between two marks, so that their labels do not overlap
LEAST_DEPTH_RATIO = 1.15  # of two points, for the question which one is nearer


@dataclass(frozen=True, kw_only=True)
class VQAConfig:
    """Parameters of questions and clips."""

    turns: int = 4  # questions per sequence
    longest_side: int = 480  # of the clips, pixels
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.turns <= MOST_TURNS:
            raise ValueError(f"turns = {self.turns}: 1 to {MOST_TURNS} questions per sequence")
        if self.longest_side < 32:
            raise ValueError(f"longest_side = {self.longest_side}: at least 32 pixels")


@dataclass(frozen=True)
class TrackQuestion:
    """A question, its answer, and the labels to draw for it: image → label → position."""

    kind: str
    question: str
    answer: str
    marks: dict[int, dict[str, NDArray[np.int64]]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrackTable:
    """Tracks with positions in thousandths of the image."""

    position: NDArray[np.int64]  # [T, F, 2]
    visible: NDArray[np.bool_]  # [T, F]
    depth: NDArray[np.floating]  # [T, F]

    @classmethod
    def of(cls, tracks: Tracks, sizes: NDArray[np.int64]) -> TrackTable:
        """`sizes` [F, 2] are the widths and heights of the images."""
        position = np.clip(np.rint(tracks.uv / sizes * 1000), 0, 1000).astype(np.int64)
        return cls(position, tracks.visible, tracks.depth)

    def pick(self, rng: np.random.Generator, allowed: NDArray[np.bool_]) -> tuple[int, int] | None:
        """A random track and image, not the first, where `allowed` [T, F] is true; None if there is none."""
        tracks, images = np.nonzero(allowed[:, 1:])
        if not len(tracks):
            return None
        chosen = int(rng.integers(len(tracks)))
        return int(tracks[chosen]), int(images[chosen]) + 1


# ---- the kinds of questions: each function returns one, or None if the tracks do not allow it -----------------------


def _point(table: TrackTable, rng: np.random.Generator) -> TrackQuestion | None:
    if (picked := table.pick(rng, table.visible)) is None:
        return None
    track, image = picked
    question = (
        f"A point lies at {_text(table.position[track, 0])} in image 1. Where does the same point lie in image "
        f"{image + 1}? Give the [x, y] position."
    )
    return TrackQuestion("point", question, _text(table.position[track, image]))


def _visible(table: TrackTable, rng: np.random.Generator) -> TrackQuestion | None:
    yes = bool(rng.integers(2))
    picked = table.pick(rng, table.visible == yes)
    if picked is None:
        return None
    track, image = picked
    question = f"A point lies at {_text(table.position[track, 0])} in image 1. Can it be seen in image {image + 1}?"
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
    at_first, at_second = _text(table.position[first, 0]), _text(table.position[second, 0])
    question = (
        f"In image 1, point A lies at {at_first} and point B at {at_second}. "
        f"Which of the two is nearer to the camera in image {image + 1}?"
    )
    return TrackQuestion("nearer", question, "A" if ratio[second] > 1 else "B")


def _choose(table: TrackTable, rng: np.random.Generator) -> TrackQuestion | None:
    """Four labels, one of them right; the others are at other tracks, or at random positions if there are too few."""
    if (picked := table.pick(rng, table.visible)) is None:
        return None
    track, image = picked
    positions = [table.position[track, image]]
    others = rng.permutation(np.flatnonzero(table.visible[:, image]))
    for position in [*table.position[others, image], *rng.integers(40, 961, (200, 2))]:
        if len(positions) < 4 and all(np.hypot(*(position - other)) >= LEAST_DISTANCE for other in positions):
            positions.append(position)
    letters = rng.permutation(list("ABCD"[: len(positions)]))
    pairs = sorted(zip(letters, positions, strict=True), key=lambda pair: pair[0])
    marks = {str(letter): position for letter, position in pairs}
    question = (
        f"A point is marked REF in image 1. Which of the points marked {', '.join(marks)} in image {image + 1} is the "
        "same point? Answer with its letter."
    )
    return TrackQuestion("choose", question, str(letters[0]), {0: {"REF": table.position[track, 0]}, image: marks})


KINDS: dict[str, Callable[[TrackTable, np.random.Generator], TrackQuestion | None]] = {
    "point": _point,
    "choose": _choose,
    "visible": _visible,
    "nearer": _nearer,
}


def draw_questions(table: TrackTable, rng: np.random.Generator, count: int) -> list[TrackQuestion]:
    """Up to `count` different questions, the kinds in turn; "choose" at most once: its marks stay in the clip."""
    order = [str(kind) for kind in rng.permutation(list(KINDS))]
    questions: list[TrackQuestion] = []
    for attempt in range(4 * count):
        kind = order[attempt % len(order)]
        if len(questions) < count and not (kind == "choose" and any(other.kind == "choose" for other in questions)):
            new = KINDS[kind](table, rng)
            if new is not None and all(new.question != other.question for other in questions):
                questions.append(new)
    return questions


def _text(position: NDArray[np.int64]) -> str:
    return f"[{position[0]}, {position[1]}]"


# ---- clips and records ----------------------------------------------------------------------------------------------


def draw_marks(image: NDArray[np.uint8], marks: dict[str, NDArray[np.int64]]) -> NDArray[np.uint8]:
    """The image with a ring and a label at each position, legible on any background."""
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    size = max(9, min(canvas.size) // 22)
    font = ImageFont.load_default(size)
    for label, position in marks.items():
        x, y = (float(part) / 1000 * side for part, side in zip(position, canvas.size, strict=True))
        radius = size / 2.5
        for width, colour in ((4, "black"), (2, "yellow")):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)
        # Beside the ring, on the side with more space.
        anchor = ("r" if x > canvas.width / 2 else "l") + "m"
        beside = x - 1.5 * radius if x > canvas.width / 2 else x + 1.5 * radius
        draw.text((beside, y), label, "yellow", font, anchor, stroke_width=2, stroke_fill="black")
    return np.asarray(canvas)


def _record(identity: str, questions: list[TrackQuestion], images: int, video: str) -> dict[str, Any]:
    texts = [text for question in questions for text in (question.question, question.answer)]
    texts[0] = f"<image>\n{PREFACE.format(count=images)}\n{texts[0]}"
    return record_json(identity, texts, SOURCE, video)


def _clip_frames(scene: Scene, frames: NDArray[np.int64], longest_side: int) -> list[NDArray[np.uint8]]:
    """The frames at one size with even sides: that of the first, scaled down to `longest_side`."""
    width, height = scene.image_size(int(frames[0]))
    scale = min(1.0, longest_side / max(width, height))
    size = (max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2))
    pictures = (Image.fromarray(scene.image(int(frame))) for frame in frames)
    return [np.asarray(p if p.size == size else p.resize(size, Image.Resampling.LANCZOS)) for p in pictures]


def make_vqa(
    library: Path,
    annotations: Path,
    out: Path,
    config: VQAConfig | None = None,
    workers: int = 1,
    part: tuple[int, int] = (0, 1),
) -> Iterator[int]:
    """Writes clips and records of all annotated sequences, and yields the number of each shard once it exists.

    Shards, parts and resuming are those of the annotations.
    """
    config = config or VQAConfig()
    reader = AnnotationReader(annotations)
    settings = reader.settings
    reader.check_complete(shards_in_part(settings.shards, part))
    about = json.dumps({"annotations": settings.digest, **asdict(config)}, indent=1) + "\n"
    (out / "videos").mkdir(parents=True, exist_ok=True)
    if (out / ABOUT_FILE).exists() and (out / ABOUT_FILE).read_bytes() != about.encode():
        raise ValueError(f"{out} was made from other annotations or with other settings; give another --out")
    write_atomically(out / ABOUT_FILE, about.encode())
    missing = []
    for number in shards_in_part(settings.shards, part):
        if records_path(out, number).exists():
            yield number
        else:
            missing.append(number)
            sweep_partials(records_path(out, number))
    for number, _ in in_processes(partial(write_shard, library, annotations, out, config), missing, workers):
        yield number


def records_path(out: Path, number: int) -> Path:
    return out / f"records-{number:05d}.json"


def omitted_path(out: Path, number: int) -> Path:
    return out / f"omitted-{number:05d}.txt"


def write_shard(library: Path, annotations: Path, out: Path, config: VQAConfig, number: int) -> None:
    """Writes the clips of one shard, then its records; `omitted-….txt` lists sequences without a record, and why."""
    reader = AnnotationReader(annotations)
    folder = out / "videos" / f"{number:05d}"
    folder.mkdir(parents=True, exist_ok=True)
    entries = {entry.name: entry for entry in reader.settings.scenes}

    @lru_cache(maxsize=1)  # consecutive sequences share a scene
    def open_once(name: str) -> Scene:
        scene = open_scene(library / name)
        check_unchanged(scene, entries[name])
        return scene

    records, omitted = [], []
    for index in reader.settings.sequences_in_shard(number):
        name, tracks = reader[index].scene, reader[index].tracks
        video = f"videos/{number:05d}/{index:08d}.mp4"
        try:
            questions = _write_sequence(open_once(name), tracks, out / video, config, index)
        except (OSError, ValueError) as error:
            omitted.append(f"{index} {name}: {error}".replace(f"{library}{os.sep}", ""))
            continue
        records.append(_record(f"{index:08d}", questions, len(tracks.frames), video))
    if omitted:
        write_atomically(omitted_path(out, number), ("\n".join(omitted) + "\n").encode())
    write_atomically(records_path(out, number), (json.dumps(records, indent=1) + "\n").encode())


def _write_sequence(scene: Scene, tracks: Tracks, video: Path, config: VQAConfig, index: int) -> list[TrackQuestion]:
    """Draws the questions of one sequence and writes its clip with their marks."""
    sizes = np.array([scene.image_size(int(frame)) for frame in tracks.frames])
    rng = np.random.default_rng([config.seed, index])
    questions = draw_questions(TrackTable.of(tracks, sizes), rng, config.turns)
    if not questions:
        raise ValueError("no track gives a question")
    frames = _clip_frames(scene, tracks.frames, config.longest_side)
    for question in questions:
        for image, marks in question.marks.items():
            frames[image] = draw_marks(frames[image], marks)
    sweep_partials(video)
    write_clip(video, frames, fps=1)
    return questions

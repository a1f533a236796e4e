"""The fairness baseline: the very tracks that GASP is supervised with, told in words.

Whoever claims that a geometric loss helps must show that the same geometry as ordinary training text does not help as
much. So every annotated sequence becomes one record in the schema of LLaVA-Video-178K: its frames as a clip, and a few
questions whose answers are read off its tracks. Same frames, same tracks, same number of samples.

Images are counted from 1, the anchor first. Positions are whole numbers from [0, 0] at the top left to [1000, 1000] at
the bottom right of an image, each axis on its own, so they survive whatever resizing a processor does. In the kind
"choose" labels are drawn into the images, as in BLINK's visual correspondence; no other kind touches a pixel.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gasp_fast.data.annotations.cache import AnnotationCache
from gasp_fast.data.annotations.shards import numbers_of_part
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import Tracks
from gasp_fast.files import sweep_partials, write_atomically
from gasp_fast.processes import in_processes

from .clips import write_clip

SOURCE = "gasp_tracks_as_vqa"
ABOUT_FILE = "about.txt"  # not .json: whatever ends so is taken for a list of records
PREFACE = (
    "The clip shows {count} images of one place. A position is [x, y], from [0, 0] at the top left of an image to "
    "[1000, 1000] at its bottom right."
)
APART = 80  # thousandths between two marks, so that their labels do not cover each other
DEEPER = 1.15  # ratio of two depths from which one is called nearer


@dataclass(frozen=True, kw_only=True)
class VQAConfig:
    """How tracks are told."""

    turns: int = 4  # questions about a sequence
    longest_side: int = 480  # of the clips, pixels
    seed: int = 0

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise ValueError(f"turns = {self.turns}: ask at least one question")
        if self.longest_side < 32:
            raise ValueError(f"longest_side = {self.longest_side}: give at least 32 pixels")


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and the labels that must be drawn for it: image → label → position."""

    kind: str
    question: str
    answer: str
    marks: dict[int, dict[str, NDArray[np.int64]]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrackTable:
    """Tracks in the language of the questions: positions in thousandths."""

    place: NDArray[np.int64]  # [T, F, 2]
    visible: NDArray[np.bool_]  # [T, F]
    depth: NDArray[np.floating]  # [T, F]

    @classmethod
    def of(cls, tracks: Tracks, sizes: NDArray[np.int64]) -> TrackTable:
        """`sizes` [F, 2] are the widths and heights of the images that `tracks` are in."""
        place = np.clip(np.rint(tracks.uv / sizes * 1000), 0, 1000).astype(np.int64)
        return cls(place, tracks.visible, tracks.depth)

    def pick(self, rng: np.random.Generator, wanted: NDArray[np.bool_]) -> tuple[int, int] | None:
        """A track and an image after the first for which `wanted` [T, F] holds."""
        tracks, images = np.nonzero(wanted[:, 1:])
        if not len(tracks):
            return None
        chosen = int(rng.integers(len(tracks)))
        return int(tracks[chosen]), int(images[chosen]) + 1


# ---- the kinds of questions: each returns one, or None where the tracks do not allow it -----------------------------


def _point(table: TrackTable, rng: np.random.Generator) -> Turn | None:
    if (picked := table.pick(rng, table.visible)) is None:
        return None
    track, image = picked
    question = (
        f"A point lies at {_text(table.place[track, 0])} in image 1. Where does the same point lie in image "
        f"{image + 1}? Give the [x, y] position."
    )
    return Turn("point", question, _text(table.place[track, image]))


def _visible(table: TrackTable, rng: np.random.Generator) -> Turn | None:
    yes = bool(rng.integers(2))
    picked = table.pick(rng, table.visible == yes)
    if picked is None:
        return None
    track, image = picked
    question = f"A point lies at {_text(table.place[track, 0])} in image 1. Can it be seen in image {image + 1}?"
    return Turn("visible", question, "Yes" if yes else "No")


def _nearer(table: TrackTable, rng: np.random.Generator) -> Turn | None:
    if (picked := table.pick(rng, table.visible)) is None:
        return None
    first, image = picked
    ratio = np.maximum(table.depth[:, image], 1e-9) / table.depth[first, image]
    others = np.flatnonzero(table.visible[:, image] & (np.abs(np.log(ratio)) > np.log(DEEPER)))
    if not len(others):
        return None
    second = int(rng.choice(others))
    question = (
        f"In image 1, point A lies at {_text(table.place[first, 0])} and point B at {_text(table.place[second, 0])}. "
        f"Which of the two is nearer to the camera in image {image + 1}?"
    )
    return Turn("nearer", question, "A" if ratio[second] > 1 else "B")


def _choose(table: TrackTable, rng: np.random.Generator) -> Turn | None:
    """Four labels, one of them right; the wrong ones are other tracks where there are enough, else random places."""
    if (picked := table.pick(rng, table.visible)) is None:
        return None
    track, image = picked
    places = [table.place[track, image]]
    others = rng.permutation(np.flatnonzero(table.visible[:, image]))
    for place in [*table.place[others, image], *rng.integers(40, 961, (200, 2))]:
        if len(places) < 4 and all(np.hypot(*(place - other)) >= APART for other in places):
            places.append(place)
    letters = rng.permutation(list("ABCD"[: len(places)]))
    marks = {
        str(letter): place for letter, place in sorted(zip(letters, places, strict=True), key=lambda pair: pair[0])
    }
    question = (
        f"A point is marked REF in image 1. Which of the points marked {', '.join(marks)} in image {image + 1} is the "
        "same point? Answer with its letter."
    )
    return Turn("choose", question, str(letters[0]), {0: {"REF": table.place[track, 0]}, image: marks})


KINDS: dict[str, Callable[[TrackTable, np.random.Generator], Turn | None]] = {
    "point": _point,
    "choose": _choose,
    "visible": _visible,
    "nearer": _nearer,
}


def ask(table: TrackTable, rng: np.random.Generator, turns: int) -> list[Turn]:
    """Up to `turns` questions, the kinds in turn; "choose" once at most, since its marks stay in the clip."""
    order = [str(kind) for kind in rng.permutation(list(KINDS))]
    asked: list[Turn] = []
    for attempt in range(4 * turns):
        kind = order[attempt % len(order)]
        if len(asked) < turns and not (kind == "choose" and any(turn.kind == "choose" for turn in asked)):
            turn = KINDS[kind](table, rng)
            if turn is not None and all(turn.question != other.question for other in asked):
                asked.append(turn)
    return asked


def _text(place: NDArray[np.int64]) -> str:
    return f"[{place[0]}, {place[1]}]"


# ---- clips and records ----------------------------------------------------------------------------------------------


def draw_marks(image: NDArray[np.uint8], marks: dict[str, NDArray[np.int64]]) -> NDArray[np.uint8]:
    """The image with a ring and a label at each position, legible on any ground."""
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    size = max(9, min(canvas.size) // 22)
    font = ImageFont.load_default(size)
    for label, place in marks.items():
        x, y = (float(share) / 1000 * side for share, side in zip(place, canvas.size, strict=True))
        radius = size / 2.5
        for width, colour in ((4, "black"), (2, "yellow")):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)
        # Beside the ring, on the side that has more room.
        anchor = ("r" if x > canvas.width / 2 else "l") + "m"
        beside = x - 1.5 * radius if x > canvas.width / 2 else x + 1.5 * radius
        draw.text((beside, y), label, "yellow", font, anchor, stroke_width=2, stroke_fill="black")
    return np.asarray(canvas)


def as_record(identity: str, turns: list[Turn], images: int, video: str) -> dict[str, Any]:
    """A conversation in the LLaVA-Video schema."""
    talk = []
    for number, turn in enumerate(turns):
        opening = f"<image>\n{PREFACE.format(count=images)}\n" if number == 0 else ""
        talk.append({"from": "human", "value": opening + turn.question})
        talk.append({"from": "gpt", "value": turn.answer})
    return {"id": identity, "conversations": talk, "data_source": SOURCE, "video": video}


def _clip_frames(scene: Scene, frames: NDArray[np.int64], longest_side: int) -> list[NDArray[np.uint8]]:
    """The frames in one size with even sides: that of the first, shrunk if it is larger than asked."""
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
    """Tells all annotated sequences, shard by shard, and yields each shard's number; resumable like the annotations."""
    config = config or VQAConfig()
    plan = AnnotationCache(annotations).plan
    about = json.dumps({"annotations": plan.digest, **asdict(config)}, indent=1) + "\n"
    (out / "videos").mkdir(parents=True, exist_ok=True)
    if (out / ABOUT_FILE).exists() and (out / ABOUT_FILE).read_text() != about:
        raise ValueError(f"{out} was made from other annotations or with other settings: give another --out")
    write_atomically(out / ABOUT_FILE, about.encode())
    missing = []
    for number in numbers_of_part(plan.shards, part):
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
    """The clips of one shard, then its records; sequences that cannot be told are named in `omitted-….txt`."""
    cache = AnnotationCache(annotations)
    folder = out / "videos" / f"{number:05d}"
    folder.mkdir(parents=True, exist_ok=True)
    scenes: tuple[str, Scene | None] = ("", None)
    records, omitted = [], []
    for index in cache.plan.of_shard(number):
        name, tracks = cache[index].scene, cache[index].tracks
        video = f"videos/{number:05d}/{index:08d}.mp4"
        try:
            if scenes[0] != name or scenes[1] is None:
                scenes = (name, open_scene(library / name))
            turns = _tell(scenes[1], tracks, out / video, config, index)  # type: ignore[arg-type]
        except (OSError, ValueError) as error:
            omitted.append(f"{index} {name}: {error}".replace(f"{library}{os.sep}", ""))
            continue
        records.append(as_record(f"{index:08d}", turns, len(tracks.frames), video))
    if omitted:
        write_atomically(omitted_path(out, number), ("\n".join(omitted) + "\n").encode())
    write_atomically(records_path(out, number), (json.dumps(records, indent=1) + "\n").encode())


def _tell(scene: Scene, tracks: Tracks, video: Path, config: VQAConfig, index: int) -> list[Turn]:
    sizes = np.array([scene.image_size(int(frame)) for frame in tracks.frames])
    turns = ask(TrackTable.of(tracks, sizes), np.random.default_rng([config.seed, index]), config.turns)
    if not turns:
        raise ValueError("no track to ask about")
    frames = _clip_frames(scene, tracks.frames, config.longest_side)
    for turn in turns:
        for image, marks in turn.marks.items():
            frames[image] = draw_marks(frames[image], marks)
    sweep_partials(video)
    write_clip(video, frames, fps=1)
    return turns

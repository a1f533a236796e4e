"""Questions and answers about synthetic scenes, in the schema of LLaVA-Video-178K, with an mp4 clip of each scene.

They are language data for joint training without a download. Answers follow from the exact geometry in the scene's
`meta.json` and poses, not from pixels. A question is written only if its answer is clear to a person: boxes that are
hardly visible are not counted or named, and distances, positions and turns must differ by a margin.

The output folder is one "config" in the layout of LLaVA-Video-178K: JSON lists beside their videos.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gasp_fast.data.errors import reading
from gasp_fast.data.images import open_image
from gasp_fast.data.questions.video_qa import record_json
from gasp_fast.data.video.write import write_clip
from gasp_fast.files import read_json, write_atomically

from .layout import COLOURS

Float = NDArray[np.float64]

SOURCE = "gasp_synthetic"
SEEN = 0.01  # a box with at least this share of the image's pixels counts as visible
UNSEEN = 0.002  # below this share it counts as absent; between the two there is no question about it
CHOOSE = "Please provide your answer by stating the letter followed by the full option."


@dataclass(frozen=True)
class SceneQuestion:
    """One question; if it has `options`, the answer is one of them."""

    kind: str
    text: str
    answer: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class SceneFacts:
    """The geometry of a scene from which questions are made."""

    name: str
    seed: int
    colours: list[str]  # of each box
    pixels: Float  # [B, F], share of the image
    distance: Float  # [B, F], from the camera to the nearest point of the box
    column: Float  # [B, F], of the box's centre in the image, 0 left to 1 right
    heading: Float  # [F], the camera's azimuth in degrees, unwrapped; it grows when the camera turns left

    @classmethod
    def of(cls, meta: dict[str, Any], camera_to_world: Float, intrinsics: Float) -> SceneFacts:
        width, height = meta["color_wh"]
        eyes, forward = camera_to_world[:, :3, 3], camera_to_world[:, :3, 2]
        distance, column = [], []
        for box in meta["boxes"]:
            c, s = np.cos(box["yaw"]), np.sin(box["yaw"])
            inside = (eyes - box["centre"]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
            distance.append(np.linalg.norm(np.maximum(np.abs(inside) - box["half"], 0), axis=1))
            seen = np.einsum("fji,fj->fi", camera_to_world[:, :3, :3], box["centre"] - eyes)  # [F, 3], camera axes
            column.append((intrinsics[0, 0] * seen[:, 0] / np.maximum(seen[:, 2], 1e-3) + intrinsics[0, 2]) / width)
        return cls(
            name=meta["name"],
            seed=meta["seed"],
            colours=[box["colour"] for box in meta["boxes"]],
            pixels=np.array([box["pixels_per_frame"] for box in meta["boxes"]]) / (width * height),
            distance=np.array(distance),
            column=np.array(column),
            heading=np.degrees(np.unwrap(np.arctan2(forward[:, 1], forward[:, 0]))),
        )

    def unique(self, frame: int) -> list[int]:
        """Visible boxes of `frame` whose colour no other box has."""
        return [
            number
            for number, colour in enumerate(self.colours)
            if self.colours.count(colour) == 1 and self.pixels[number, frame] >= SEEN
        ]

    @property
    def clear(self) -> bool:
        """Whether every box is either visible in some frame or absent from all."""
        most = self.pixels.max(axis=1)
        return bool(np.all((most >= SEEN) | (most < UNSEEN)))


# ---- the kinds of questions: each function returns one, or None if the answer is not clear --------------------------


def _count(facts: SceneFacts, rng: np.random.Generator) -> SceneQuestion | None:
    if not facts.clear:
        return None
    number = int(np.sum(facts.pixels.max(axis=1) >= SEEN))
    options = sorted({number, *(max(1, number + int(step)) for step in rng.permutation([-2, -1, 1, 2, 3])[:3])})
    return SceneQuestion("count", "How many boxes can be seen in the video?", f"{number}", tuple(map(str, options)))


def _count_colour(facts: SceneFacts, rng: np.random.Generator) -> SceneQuestion | None:
    if not facts.clear:
        return None
    colour = str(rng.choice(sorted(set(facts.colours))))
    own = [number for number, other in enumerate(facts.colours) if other == colour]
    number = int(np.sum(facts.pixels[own].max(axis=1) >= SEEN))
    return SceneQuestion("count_colour", f"How many {colour} boxes can be seen in the video?", f"{number}")


def _present(facts: SceneFacts, rng: np.random.Generator) -> SceneQuestion | None:
    if not facts.clear:
        return None
    seen = {c for c, pixels in zip(facts.colours, facts.pixels, strict=True) if pixels.max() >= SEEN}
    absent = COLOURS.keys() - seen
    if not absent or not seen:
        return None
    yes = bool(rng.integers(2))
    colour = str(rng.choice(sorted(seen if yes else absent)))
    return SceneQuestion("present", f"Is there a {colour} box in the room?", "Yes" if yes else "No", ("Yes", "No"))


def _two_boxes(facts: SceneFacts, rng: np.random.Generator) -> tuple[int, int] | None:
    boxes = facts.unique(0)
    return None if len(boxes) < 2 else tuple(int(n) for n in rng.permutation(boxes)[:2])  # type: ignore[return-value]


def _nearer(facts: SceneFacts, rng: np.random.Generator) -> SceneQuestion | None:
    if (pair := _two_boxes(facts, rng)) is None:
        return None
    near, far = sorted(pair, key=lambda number: facts.distance[number, 0])
    if facts.distance[far, 0] < 1.25 * facts.distance[near, 0]:
        return None
    first, second = (facts.colours[number] for number in pair)
    text = f"In the first frame, which box is nearer to the camera, the {first} one or the {second} one?"
    options = (f"The {first} box", f"The {second} box")
    return SceneQuestion("nearer", text, f"The {facts.colours[near]} box", options)


def _beside(facts: SceneFacts, rng: np.random.Generator) -> SceneQuestion | None:
    if (pair := _two_boxes(facts, rng)) is None:
        return None
    first, second = pair
    apart = facts.column[first, 0] - facts.column[second, 0]
    if abs(apart) < 0.15:
        return None
    text = (
        f"In the first frame, is the {facts.colours[first]} box to the left or to the right of the "
        f"{facts.colours[second]} box?"
    )
    return SceneQuestion(
        "beside", text, "To the left" if apart < 0 else "To the right", ("To the left", "To the right")
    )


def _turn(facts: SceneFacts, rng: np.random.Generator) -> SceneQuestion | None:
    turned = facts.heading[-1] - facts.heading[0]
    swing = facts.heading.max() - facts.heading.min()
    if abs(turned) < 15 or swing > 1.3 * abs(turned):
        return None
    text = "From the first frame to the last, does the camera turn to the left or to the right?"
    return SceneQuestion("turn", text, "To the left" if turned > 0 else "To the right", ("To the left", "To the right"))


def _approach(facts: SceneFacts, rng: np.random.Generator) -> SceneQuestion | None:
    both = [number for number in facts.unique(0) if facts.pixels[number, -1] >= SEEN]
    if not both:
        return None
    box = int(rng.choice(both))
    ratio = facts.distance[box, -1] / facts.distance[box, 0]
    if 0.8 < ratio < 1.25:
        return None
    text = f"Does the camera end nearer to the {facts.colours[box]} box than it began?"
    return SceneQuestion("approach", text, "Yes" if ratio < 1 else "No", ("Yes", "No"))


def _twins(facts: SceneFacts, rng: np.random.Generator) -> SceneQuestion | None:
    seen = facts.pixels[:2].min(axis=0).max() >= SEEN
    if not seen or facts.colours.count(facts.colours[0]) != 2:
        return None
    options = tuple(sorted(set(facts.colours)))
    return SceneQuestion(
        "twins", "Two boxes in the room look exactly alike. What colour are they?", facts.colours[0], options
    )


KINDS = (_count, _count_colour, _present, _nearer, _beside, _turn, _approach, _twins)


# ---- records --------------------------------------------------------------------------------------------------------


def questions_about(facts: SceneFacts) -> list[SceneQuestion]:
    """One question of each kind that has a clear answer, in an order drawn with the scene's seed."""
    rng = np.random.default_rng([facts.seed, 3])
    questions = [question for kind in KINDS if (question := kind(facts, rng)) is not None]
    return [questions[place] for place in rng.permutation(len(questions))]


def question_record(identity: str, question: SceneQuestion, video: str, choice: bool) -> dict[str, Any]:
    """The question in the LLaVA-Video schema, open-ended or as a choice between its options."""
    text, answer = question.text, f"{question.answer}."
    if choice and len(question.options) > 1:
        lettered = [f"{'ABCDEF'[place]}. {option}." for place, option in enumerate(question.options)]
        text = "\n".join([text, *lettered, CHOOSE])
        answer = lettered[question.options.index(question.answer)]
    return record_json(identity, (f"<image>\n{text}", answer), SOURCE, video)


def read_facts(scene: Path) -> SceneFacts:
    """The facts of a rendered scene folder."""
    meta = read_json(scene / "meta.json")
    if not isinstance(meta, dict) or "boxes" not in meta:
        raise ValueError(f"{scene}: not a synthetic scene; its meta.json lists no boxes")
    with reading(scene / "meta.json", "the facts of a rendered scene"):
        poses = np.stack([np.loadtxt(path) for path in sorted((scene / "pose").iterdir())])
        return SceneFacts.of(meta, poses, np.loadtxt(scene / "intrinsics.txt"))


def _pixels(path: Path) -> NDArray[np.uint8]:
    with reading(path, "image"), open_image(path) as image:
        return np.asarray(image)


def write_qa(scenes: Sequence[Path], out: Path, workers: int = 2) -> Iterator[Path]:
    """Writes and yields `NAME.mp4` for each rendered scene, then writes `qa.json` with all questions."""
    out.mkdir(parents=True, exist_ok=True)

    def one(scene: Path) -> list[dict[str, Any]]:
        facts, video = read_facts(scene), f"{scene.name}.mp4"
        frames = [_pixels(path) for path in sorted((scene / "color").iterdir())]
        write_clip(out / video, frames, fps=4)
        rng = np.random.default_rng([facts.seed, 4])
        return [
            question_record(f"{scene.name}-{question.kind}", question, video, choice=bool(rng.integers(2)))
            for question in questions_about(facts)
        ]

    records = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for scene, scene_records in zip(scenes, pool.map(one, scenes), strict=True):
            records += scene_records
            yield out / f"{scene.name}.mp4"
    write_atomically(out / "qa.json", (json.dumps(records, indent=1) + "\n").encode())

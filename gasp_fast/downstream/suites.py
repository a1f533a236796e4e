"""The benchmarks: their tasks in lmms-eval 0.7.3, where their data lie, what a model sees, and how a score is a mean.

A score is a mean of means: of all questions, or of the means of groups of questions, which may have groups again.
`group` gives the path of a question's group. VSI-Bench, for example, is the mean of eight categories, of which relative
direction is the mean of three; CV-Bench is the mean of 2D and 3D, of which 2D is the mean of two sources.

The paper does not state how many frames or pixels its models see. Here a video is 32 frames of at most 451,584 pixels,
the frame size of the Qwen recipe, and an image has at most 1,605,632 pixels, lmms-eval's limit for Qwen2.5-VL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Sample = Mapping[str, Any]  # of one question: lmms-eval's verdicts, by the name of the metric
Path = tuple[str, ...]

FRAMES = 32
VIDEO_PIXELS = 451_584
IMAGE_PIXELS = 1_605_632


@dataclass(frozen=True)
class Data:
    """A dataset on the hub, and the folder with its videos, if it has any; both in the folder of data."""

    repository: str
    media: str = ""


@dataclass(frozen=True)
class Benchmark:
    """One row of the tables. `score` and `group` read the verdict on one answer."""

    key: str  # as it is chosen on the command line
    title: str
    tasks: tuple[str, ...]
    data: Data
    metric: str  # lmms-eval's name of the verdicts
    score: Callable[[Any], float]
    videos: bool = False
    group: Callable[[Any], Path] = lambda verdict: ()
    category: Callable[[Any], str] | None = None  # a column of the table; None: the task is the category
    overall: str = ""  # lmms-eval's name of the score of a task; empty: as `metric`
    scale: float = 1.0  # lmms-eval's score is this times a share
    unit: Callable[[Any], float] = lambda verdict: 1.0  # what a question counts in its mean
    questions: int | None = None  # in the whole benchmark, where a part of it may be missing
    extra: tuple[str, ...] = ()  # further metrics that are kept
    notes: tuple[str, ...] = field(default=())

    @property
    def frames(self) -> int | None:
        return FRAMES if self.videos else None

    @property
    def pixels(self) -> int:
        return VIDEO_PIXELS if self.videos else IMAGE_PIXELS


def of(name: str) -> Callable[[Any], float]:
    return lambda verdict: float(verdict[name])


def text_of(name: str) -> Callable[[Any], str]:
    return lambda verdict: str(verdict[name])


def itself(verdict: Any) -> float:
    return float(verdict)


# ---- VSI-Bench and CV-Bench: means of means -------------------------------------------------------------------------


def vsi_group(verdict: Any) -> Path:
    kind = str(verdict["question_type"])
    direction = "object_rel_direction"
    return (direction, kind) if kind.startswith(direction) else (kind,)


def vsi_score(verdict: Any) -> float:
    return float(verdict["accuracy"] if "accuracy" in verdict else verdict["MRA:.5:.95:.05"])


def cv_group(verdict: Any) -> Path:
    source = str(verdict["source"])
    return ("3D",) if source == "Omni3D" else ("2D", source)


# ---- the benchmarks -------------------------------------------------------------------------------------------------

BLINK_TASKS = (
    "art_style", "counting", "forensic_detection", "functional_correspondence", "iq_test", "jigsaw",
    "multi_view_reasoning", "object_localization", "relative_depth", "relative_reflectance",
    "semantic_correspondence", "spatial_relation", "visual_correspondence", "visual_similarity",
)  # fmt: skip


def _vsi(key: str, title: str, task: str, note: str) -> Benchmark:
    return Benchmark(
        key, title, (task,), Data("nyu-visionx/VSI-Bench", "vsibench"), "vsibench_overall", vsi_score, videos=True,
        group=vsi_group, category=lambda verdict: vsi_group(verdict)[0], notes=(note,),
    )  # fmt: skip


def _blink(key: str, title: str, names: Sequence[str]) -> Benchmark:
    return Benchmark(
        key, title, tuple(f"blink_{name}" for name in names), Data("BLINK-Benchmark/BLINK"), "blink_acc",
        of("is_correct"), notes=("The mean of all questions; tasks with more questions count more.",),
    )  # fmt: skip


_ALL = (
    Benchmark(
        "all_angles", "All-Angles Bench", ("all_angles",), Data("ch-chenyu/All-Angles-Bench"), "all_angles_acc",
        of("score"), category=text_of("category"), questions=2132,
        notes=("Most images are under Ego-Exo4D's own licence. Questions whose images are missing are left out.",),
    ),
    _vsi(
        "vsibench", "VSI-Bench", "vsibench_any_part",
        "The mean of eight categories; relative direction is the mean of its three parts.",
    ),
    _blink("blink", "BLINK", BLINK_TASKS),
    Benchmark(
        "cv_bench", "CV-Bench", ("cv_bench_official",), Data("nyu-visionx/CV-Bench"), "cv_bench_official",
        of("is_correct"), group=cv_group, category=text_of("source"),
        notes=("The official score: ½ ((ADE20K + COCO) / 2 + Omni3D).",),
    ),
    Benchmark(
        "videomme", "Video-MME", ("videomme",), Data("lmms-eval/Video-MME", "videomme"), "videomme_perception_score",
        of("score"), videos=True, category=text_of("duration"), scale=100.0, notes=("Without subtitles.",),
    ),
    Benchmark(
        "tempcompass", "TempCompass",
        ("tempcompass_offline_multi_choice", "tempcompass_offline_yes_no", "tempcompass_offline_caption_matching"),
        Data("lmms-eval/TempCompass", "tempcompass"), "avg_accuracy", of("rating"), videos=True, scale=100.0,
        extra=("undecided",), notes=("The mean of all questions, without captioning, which needs an online judge.",),
    ),
    Benchmark(
        "nextqa", "NExT-QA", ("nextqa_mc_test",), Data("lmms-eval/NExTQA", "nextqa"), "exact_match", itself,
        videos=True,
        notes=("Multiple choice. Of an answer without a letter, lmms-eval draws one at random (with a fixed seed).",),
    ),
    Benchmark(
        "mmsi", "MMSI-Bench", ("mmsi_bench",), Data("RunsenXu/MMSI-Bench"), "average", of("score"),
        category=text_of("l2_category"),
    ),
    Benchmark(
        "mindcube", "MindCube-tiny", ("mindcube_tiny",), Data("oscarqjh/MindCube_lmmseval"), "rotation_accuracy",
        of("score"), category=text_of("type"), overall="overall_accuracy",
    ),
    Benchmark(
        "viewspatial", "ViewSpatial", ("viewspatial",), Data("oscarqjh/ViewSpatial_lmmseval"),
        "camera_perspective_relative_direction_accuracy", of("score"), category=text_of("question_type"),
        overall="overall_accuracy",
    ),
    Benchmark(
        "site_image", "SITE, images", ("site_bench_image",), Data("franky-veteran/SITE-Bench", "sitebench"),
        "chance_adjusted_acc", of("overall"), unit=of("total"), scale=100.0, notes=("Chance-adjusted accuracy.",),
    ),
    Benchmark(
        "site_video", "SITE, videos", ("site_bench_video",), Data("franky-veteran/SITE-Bench", "sitebench"),
        "chance_adjusted_acc", of("overall"), videos=True, unit=of("total"), scale=100.0,
        notes=("Chance-adjusted accuracy.",),
    ),
    Benchmark(
        "3dsr", "3DSRBench", ("3dsrbench",), Data("oscarqjh/3DSRBench_lmmseval"), "vanilla_accuracy", of("score"),
        category=text_of("main_category"),
    ),
    Benchmark(
        "embspatial", "EmbSpatial", ("embspatial",), Data("FlagEval/EmbSpatial-Bench"), "embspatial_acc",
        of("is_correct"), category=text_of("sub_task"),
    ),
    Benchmark(
        "crosspoint", "CrossPoint-Bench", ("crosspoint_bench",), Data("WangYipu2002/CrossPoint-Bench"),
        "crosspoint_accuracy", of("hit"), category=text_of("type"),
    ),
    _blink(
        "blink_correspondence", "BLINK, correspondence",
        ("functional_correspondence", "semantic_correspondence", "visual_correspondence"),
    ),
    _vsi(
        "vsibench_prior", "VSI-Bench with average sizes in the prompt", "vsibench_prior",
        "The prompt ends with the average sizes of objects and rooms in VSI-Bench's answers: a probe of bias.",
    ),
)  # fmt: skip
BENCHMARKS = {one.key: one for one in _ALL}

SPATIAL = ("all_angles", "vsibench", "blink", "cv_bench")
GENERAL = ("videomme", "tempcompass", "nextqa")
SUITES: dict[str, tuple[str, ...]] = {
    "spatial": SPATIAL,
    "general": GENERAL,
    "paper": (*SPATIAL, *GENERAL),
    "easi8": (
        "vsibench", "mmsi", "mindcube", "viewspatial", "site_image", "site_video", "blink", "3dsr", "embspatial",
    ),
    "correspondence": ("crosspoint", "blink_correspondence"),
    "bias": ("vsibench", "vsibench_prior"),
}  # fmt: skip


def chosen(suite: str) -> list[Benchmark]:
    """The benchmarks of `--suite`: suites, benchmarks and their tasks, separated by commas; each once, in order."""
    of_task = {task: one for one in reversed(_ALL) for task in one.tasks}
    found: dict[str, Benchmark] = {}
    for word in (part.strip() for part in suite.split(",")):
        if word in of_task and word not in BENCHMARKS:
            found[word] = replace(of_task[word], key=word, title=f"{of_task[word].title}: {word}", tasks=(word,))
            continue
        if word not in SUITES and word not in BENCHMARKS:
            raise ValueError(
                f"--suite {word!r} is unknown; suites are {', '.join(SUITES)}; benchmarks are {', '.join(BENCHMARKS)}"
            )
        found.update((key, BENCHMARKS[key]) for key in SUITES.get(word, (word,)))
    return list(found.values())

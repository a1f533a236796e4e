"""Traps of scoring: which answers the tasks take for right, and what they score. Questions and answers made by hand."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from support.benchmark_data import image, video

from gasp_fast.downstream.answers import Settings, subject
from gasp_fast.downstream.scores import check_against_lmms_eval, judged, score
from gasp_fast.downstream.suites import BENCHMARKS

MRA = "vsibench/vsibench_any_part.yaml"
THRESHOLDS = [0.50, 0.55, 0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95]


def mean_relative_accuracy(answer, truth):
    return sum(abs(answer - truth) / truth <= 1 - threshold for threshold in THRESHOLDS) / len(THRESHOLDS)


def number(answer, truth="10"):
    return {"question_type": "object_counting", "ground_truth": truth}, answer


def choice(answer, truth="B", kind="route_planning"):
    return {"question_type": kind, "ground_truth": truth}, answer


def of_cv_bench(answer, source="COCO"):
    return {"idx": 0, "type": "2D", "task": "Count", "source": source, "answer": "(B)", "choices": ["1", "2"]}, answer


def of_blink(answer):
    return {"idx": "0", "sub_task": "Counting", "answer": "(B)", "choices": ["1", "2", "3"]}, answer


def of_tempcompass(question, truth, answer):
    return {"video_id": "1", "dim": "action", "question": question, "answer": truth}, answer


CHOICES, CAPTIONS = "What?\nA. runs\nB. walks", "Which?\nCaption A: He runs.\nCaption B: He walks."
NEXT = {"question": "why", "answer": 2, "a0": "fun", "a1": "fear", "a2": "hurry", "a3": "rain", "a4": "dog"}
MME = {"domain": "Knowledge", "sub_category": "Geography", "task_type": "Counting Problem", "question_id": "0"}
MME |= {"duration": "short", "videoID": "x", "answer": "C"}
ANGLES = {"category": "counting", "sourced_dataset": "EgoHumans", "answer": "B"}
MMSI = {"id": 0, "question_type": "Motion (Cam.)", "answer": "D"}
SITE = {"options": ["1", "2", "3", "4"], "category": "counting & existence", "dataset": "x", "answer": "B"}
CROSS = {"type": "Correspondence-Judgement", "level": "part", "images": [], "answer": "A"}
VIEW = {"question_type": "Camera perspective - Relative Direction", "answer": "A. left"}
DSR = {"index": "VIN6MS3J", "category": "height_higher", "answer": "A"}
EMB = {"question_id": "0", "relation": "left", "data_source": "mp3d", "answer": 3}
# For each benchmark and task: its file, and questions with an answer and the score that it must get.
CASES = {
    ("vsibench", "numbers"): (
        MRA,
        [
            (number("10"), 1.0),
            (number("8"), mean_relative_accuracy(8, 10)),
            (number("16"), 0.0),
            (number("15"), mean_relative_accuracy(15, 10)),
            (number("ten"), 1.0),
            (number("There are ten chairs, room 2"), 1.0),  # the first number counts
            (number("twenty-one", "21"), 1.0),
            (number("I cannot tell"), 0.0),
            (number("1,000", "1000"), 0.0),  # read as 1
        ],
    ),
    ("vsibench", "choices"): (
        MRA,
        [
            (choice("B"), 1.0),
            (choice("b."), 1.0),
            (choice("B. left"), 1.0),
            (choice("The answer is B"), 0.0),  # only the first word counts
            (choice("(B)"), 0.0),
            (choice("B, left"), 0.0),
        ],
    ),
    ("cv_bench", "cv_bench_official"): (
        "cv_bench/cv_bench_official.yaml",
        [
            (of_cv_bench("(B)", "ADE20K"), 1.0),
            (of_cv_bench("b) 2"), 1.0),
            (of_cv_bench("Both", "Omni3D"), 1.0),  # the first letter counts, whatever the word
            (of_cv_bench("The answer is (B)"), 0.0),
            (of_cv_bench("A"), 0.0),
        ],
    ),
    ("blink", "blink_counting"): (
        "blink/blink_counting.yaml",
        [
            (of_blink("The answer is B"), 1.0),
            (of_blink("(B)"), 1.0),
            (of_blink("B"), 1.0),
            (of_blink("C"), 0.0),
            (of_blink("The point"), 0.0),
        ],
    ),
    ("videomme", "videomme"): (
        "videomme/videomme.yaml",
        [((MME, "C"), 1.0), ((MME, "The answer is C."), 1.0), ((MME, "B"), 0.0), ((MME, "none"), 0.0)],
    ),
    ("tempcompass", "tempcompass_offline_multi_choice"): (
        "tempcompass/tempcompass_offline_multi_choice.yaml",
        [
            (of_tempcompass(CHOICES, "B. walks", "B"), 1.0),
            (of_tempcompass(CHOICES, "B. walks", "B) walks"), 1.0),
            (of_tempcompass(CHOICES, "B. walks", "A. runs"), 0.0),
            (of_tempcompass(CHOICES, "B. walks", "He walks"), 0.0),  # undecided
        ],
    ),
    ("tempcompass", "tempcompass_offline_yes_no"): (
        "tempcompass/tempcompass_offline_yes_no.yaml",
        [
            (of_tempcompass("Is it?", "yes", "Yes, it is."), 1.0),
            (of_tempcompass("Is it?", "no", "yes"), 0.0),
            (of_tempcompass("Is it?", "yes", "It is."), 0.0),  # undecided
        ],
    ),
    ("tempcompass", "tempcompass_offline_caption_matching"): (
        "tempcompass/tempcompass_offline_caption_matching.yaml",
        [
            (of_tempcompass(CAPTIONS, "Caption B: He walks.", "Caption B"), 1.0),
            (of_tempcompass(CAPTIONS, "Caption B: He walks.", "A"), 0.0),
            (of_tempcompass(CAPTIONS, "Caption B: He walks.", "the second"), 0.0),  # undecided
        ],
    ),
    ("nextqa", "nextqa_mc_test"): (
        "nextqa/nextqa_mc_test.yaml",
        [
            ((NEXT, "C"), 1.0),
            ((NEXT, "(C) hurry"), 1.0),
            ((NEXT, "he was in a hurry I think"), 1.0),
            ((NEXT, "A"), 0.0),
        ],
    ),
    ("all_angles", "all_angles"): (
        "all_angles/all_angles.yaml",
        [
            ((ANGLES, "B"), 1.0),
            ((ANGLES, "(B)"), 1.0),
            ((ANGLES, "The answer is B."), 1.0),
            ((ANGLES, "B. two"), 1.0),
            ((ANGLES, "A or B"), 0.0),
            ((ANGLES, "Both"), 0.0),
            ((ANGLES, ""), 0.0),
        ],
    ),
    ("mmsi", "mmsi_bench"): ("mmsi_bench/msr_bench.yaml", [((MMSI, "``D``"), 1.0), ((MMSI, "C"), 0.0)]),
    ("mindcube", "mindcube_tiny"): (
        "mindcube/mindcube_tiny.yaml",
        [(({"id": "among_1", "gt_answer": "B"}, text), one) for text, one in (("B. right", 1.0), ("A", 0.0))],
    ),
    ("viewspatial", "viewspatial"): ("viewspatial/viewspatial.yaml", [((VIEW, "A"), 1.0), ((VIEW, "B. right"), 0.0)]),
    ("site_image", "site_bench_image"): (
        "sitebench/site_image.yaml",
        [((SITE, "B"), 1 - 1 / 4), ((SITE, "(A)"), -1 / 4)],
    ),
    ("3dsr", "3dsrbench"): ("3dsrbench/3dsrbench.yaml", [((DSR, "A. cup"), 1.0), ((DSR, "B"), 0.0)]),
    ("embspatial", "embspatial"): ("embspatial/embspatial.yaml", [((EMB, "D) x"), 1.0), ((EMB, "A"), 0.0)]),
    ("crosspoint", "crosspoint_bench"): (
        "crosspoint_bench/crosspoint_bench.yaml",
        [((CROSS, "The answer is A"), 1.0), ((CROSS, "B"), 0.0)],
    ),
}  # fmt: skip
UNDECIDED = {"multi_choice": 1, "yes_no": 1, "caption_matching": 1}
SIZE = "What is the length of the longest dimension (length, width, or height) of the {}, measured in centimeters?"
PRIOR = [
    {"question_type": "object_size_estimation", "question": SIZE.format(name), "ground_truth": size}
    for name, size in (("table", "150"), ("chair", "80"), ("chair", "101"), ("tv monitor", "60.4"))
]
PRIOR += [{"question_type": "room_size_estimation", "question": "", "ground_truth": size} for size in ("20", "30.4")]
PRIOR.append({"question_type": "route_planning", "question": "", "ground_truth": "A"})


@pytest.fixture(scope="module")
def verdicts(environment, answering, tmp_path_factory):
    """Of each task in CASES: lmms-eval's verdicts and scores. And what models see of a video and of images."""
    folder = tmp_path_factory.mktemp("verdicts")
    film, picture = ["video", str(video(folder / "clip.mp4"))], ["image", str(folder / "image.png")]
    image().resize((448, 224)).save(folder / "image.png")
    settings = Settings(frames=6, pixels=56 * 112)
    see = []
    for family in ("qwen2_5_vl", "llava_next_video"):
        who = subject("model", answering(family, "A"))
        arguments = who.arguments(settings.of(BENCHMARKS["vsibench"], family), "cpu")
        see += [[family, arguments, visual] for visual in ([film], [picture], [picture, picture])]
    tasks = {task: [file, [pair for pair, _ in cases]] for (_, task), (file, cases) in CASES.items()}
    (folder / "answers.json").write_text(json.dumps({**tasks, "prior": PRIOR, "see": see}))
    command = [environment / "bin" / "python", Path(__file__).with_name("judge.py"), "answers.json", "out.json"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env={**clean, "HF_HOME": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("key", "task"), CASES)
def test_each_answer_scores_what_it_should(verdicts, key, task):
    benchmark, (_, cases) = BENCHMARKS[key], CASES[key, task]
    samples = [{"question": n, **verdict} for n, verdict in enumerate(verdicts[task]["verdicts"])]
    found = judged(benchmark, task, samples)
    assert [one.score for one in found] == pytest.approx([expected for _, expected in cases])


@pytest.mark.slow
@pytest.mark.parametrize(("key", "task"), CASES)
def test_scores_are_those_of_lmms_eval(verdicts, key, task):
    benchmark, stated = BENCHMARKS[key], verdicts[task]["scores"]
    found = judged(benchmark, task, [{"question": n, **one} for n, one in enumerate(verdicts[task]["verdicts"])])
    assert (benchmark.overall or benchmark.metric) in stated  # not a number for a part of VSI-Bench
    check_against_lmms_eval(benchmark, task, found, stated)
    if key == "cv_bench":
        assert score(found) == pytest.approx(((1 + 1 / 3) / 2 + 1) / 2)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), UNDECIDED.items())
def test_answers_that_tempcompass_cannot_read_are_counted(verdicts, kind, count):
    assert verdicts[f"tempcompass_offline_{kind}"]["scores"]["undecided"] == count


@pytest.mark.slow
def test_the_prior_has_the_mean_size_of_each_object_and_of_rooms(verdicts):
    assert verdicts["prior"] == (
        "The longest dimension of an object is on average: chair 90 cm, table 150 cm, tv monitor 60 cm. "
        "A room has on average 25.2 square meters."
    )


@pytest.mark.slow
def test_models_see_the_frames_and_pixels_that_are_pinned(verdicts):
    film, picture, pictures = verdicts["seen"][:3]
    [[pairs, rows, columns]] = film["video_grid_thw"]  # Qwen merges two frames; a patch has 8 x 8 pixels
    assert pairs == 6 / 2 and rows * columns * 8 * 8 <= 56 * 112
    [[_, rows, columns]] = picture["image_grid_thw"]
    assert rows * columns * 8 * 8 <= 56 * 112 and columns > rows and len(pictures["image_grid_thw"]) == 2
    film, picture, pictures = verdicts["seen"][3:]
    assert film["pixel_values_videos"] == [1, 6, 3, 112, 112]
    assert picture["pixel_values"][2:] == [3, 112, 112]  # tiles
    assert pictures["pixel_values_videos"] == [1, 2, 3, 112, 112] and "pixel_values" not in pictures

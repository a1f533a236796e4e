"""Tiny datasets in the schemas of the real benchmarks, as they lie in a folder of data, and right answers to them."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from gasp_fast.data.video.write import write_clip

Rows = list[dict[str, Any]]
SIDE = 112
VSI_MRA = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
VSI_CHOICE = (
    "object_rel_direction_easy", "object_rel_direction_medium", "object_rel_direction_hard", "object_rel_distance",
    "route_planning", "obj_appearance_order",
)  # fmt: skip
OBJECT_SIZE = (
    "What is the length of the longest dimension (length, width, or height) of the {}, measured in centimeters?"
)


def image(level: int = 90) -> Image.Image:
    pixels = np.full((SIDE, SIDE, 3), level, np.uint8)
    pixels[: SIDE // 2] //= 2
    return Image.fromarray(pixels)


def video(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path, [np.asarray(image(60 + 10 * n)) for n in range(12)])
    return path


def repository(folder: Path, name: str, configurations: Mapping[str, tuple[str, Rows]]) -> Path:
    """A dataset of the hub: a file for each configuration, which has one split, and the card that names them."""
    place = folder / name
    place.mkdir(parents=True)
    card = ["---", "configs:"]
    for configuration, (split, rows) in configurations.items():
        file = f"data/{configuration}-{split}.parquet"
        (place / file).parent.mkdir(exist_ok=True)
        Dataset.from_list(rows).to_parquet(place / file)
        card += [f"- config_name: {configuration}", "  data_files:", f"  - split: {split}", f"    path: {file}"]
    (place / "README.md").write_text("\n".join([*card, "---", ""]))
    return place


def write_vsi(folder: Path) -> None:
    """Videos are in an archive. Each of ten types of question comes twice; the sizes of chairs are 80 and 100 cm."""
    rows: Rows = []
    for kind in (*VSI_MRA, *VSI_CHOICE):
        for number in range(2):
            question = OBJECT_SIZE.format("chair") if kind == "object_size_estimation" else f"What is it ({kind})?"
            answer = {"object_size_estimation": ("80", "100"), "room_size_estimation": ("20", "20")}.get(
                kind, ("4", "10")
            )
            choice = kind in VSI_CHOICE
            rows.append(
                {
                    "id": len(rows), "dataset": "scannet", "scene_name": "scene0000_00", "question_type": kind,
                    "question": question, "ground_truth": "B" if choice else answer[number],
                    "options": ["A. left", "B. right"] if choice else None, "pruned": False,
                }
            )  # fmt: skip
    place = repository(folder, "nyu-visionx/VSI-Bench", {"full": ("test", rows)})
    clip = video(folder / "clip.mp4")
    with zipfile.ZipFile(place / "scannet.zip", "w") as archive:
        archive.write(clip, "scannet/scene0000_00.mp4")
    clip.unlink()


def write_cv_bench(folder: Path) -> None:
    """Two questions of ADE20K, one of COCO, three of Omni3D; (B) is right."""
    rows: Rows = []
    for source, count in (("ADE20K", 2), ("COCO", 1), ("Omni3D", 3)):
        for _ in range(count):
            three = source == "Omni3D"
            rows.append(
                {
                    "idx": len(rows), "type": "3D" if three else "2D", "task": "Depth" if three else "Count",
                    "image": image(), "question": "How many?", "choices": ["1", "2"], "answer": "(B)",
                    "prompt": "How many? Select from the following choices.\n(A) 1\n(B) 2", "filename": "x.png",
                    "source": source, "source_dataset": source, "source_filename": "x.png", "target_class": None,
                    "target_size": None, "bbox": None,
                }
            )  # fmt: skip
    repository(folder, "nyu-visionx/CV-Bench", {"default": ("test", rows)})


def write_blink(folder: Path, tasks: Sequence[str]) -> None:
    """Two questions of each task, with two images; (A) is right."""

    def rows(task: str) -> Rows:
        return [
            {
                "idx": f"val_{task}_{n}", "question": "Which point?", "sub_task": task, "image_1": image(),
                "image_2": image(120), "image_3": None, "image_4": None, "choices": ["A", "B"], "answer": "(A)",
                "prompt": "Which point of the second image?\n(A) A\n(B) B", "explanation": "",
            }
            for n in range(2)
        ]  # fmt: skip

    repository(folder, "BLINK-Benchmark/BLINK", {task: ("val", rows(task)) for task in tasks})


def write_videomme(folder: Path) -> None:
    rows = [
        {
            "video_id": "001", "duration": duration, "domain": "Knowledge", "sub_category": "Geography",
            "url": "", "videoID": "abc", "question_id": f"001-{n}", "task_type": "Counting Problem",
            "question": "How many?", "options": ["A. 1", "B. 2", "C. 3", "D. 4"], "answer": "C",
        }
        for n, duration in enumerate(("short", "long"))
    ]  # fmt: skip
    repository(folder, "lmms-eval/Video-MME", {"default": ("test", rows)})
    video(folder / "videomme" / "data" / "abc.mp4")


def write_tempcompass(folder: Path) -> None:
    choices = "What is happening?\nA. running\nB. walking"
    captions = "Which caption?\nCaption A: He runs.\nCaption B: He walks."
    questions = {
        "multi-choice": [(choices, "B. walking")] * 2,
        "yes_no": [("Is he walking?", "yes"), ("Is he running?", "no")],
        "caption_matching": [(captions, "Caption B: He walks.")] * 2,
    }
    configurations = {
        name: ("test", [{"video_id": "1", "question": q, "answer": a, "dim": "action"} for q, a in rows])
        for name, rows in questions.items()
    }
    repository(folder, "lmms-eval/TempCompass", configurations)
    video(folder / "tempcompass" / "videos" / "1.mp4")


def write_nextqa(folder: Path) -> None:
    rows = [
        {
            "video": 4010069381, "frame_count": 12, "width": SIDE, "height": SIDE, "question": "why did he run",
            "answer": 2, "qid": n, "type": "CW", "a0": "fun", "a1": "fear", "a2": "hurry", "a3": "rain", "a4": "dog",
        }
        for n in range(2)
    ]  # fmt: skip
    repository(folder, "lmms-eval/NExTQA", {"MC": ("test", rows)})
    video(folder / "nextqa" / "NExTVideo" / "4010069381.mp4")


def write_all_angles(folder: Path) -> None:
    """Three questions; the images of the third are not there. C is right."""
    place = folder / "ch-chenyu" / "All-Angles-Bench"
    (place / "egohumans").mkdir(parents=True)
    for name in ("cam01", "cam02"):
        image().save(place / "egohumans" / f"{name}.jpg")
    sources = [("egohumans", "EgoHumans", "counting"), ("egohumans", "EgoHumans", "manipulation")]
    sources.append(("ego_exo4d_scenes", "Ego-Exo4D", "relative_distance"))
    rows = [
        {
            "index": n, "folder": where, "category": category, "pair_idx": "null", "sourced_dataset": source,
            "image_path": [f"{where}/cam01.jpg", f"{where}/cam02.jpg"], "question": "How many people?",
            "A": "1", "B": "2", "C": "3", "answer": "C",
        }
        for n, (where, source, category) in enumerate(sources)
    ]  # fmt: skip
    (place / "data.json").write_text(json.dumps(rows))


def write_easi(folder: Path) -> None:
    """MMSI, MindCube, ViewSpatial, SITE, 3DSRBench and EmbSpatial, two questions each."""
    mmsi = [
        {
            "id": n, "images": [image(), image(120)], "question_type": "Motion (Cam.)", "thought": "", "answer": "D",
            "question": "Where? Options: A: left, B: right, C: up, D: down",
        }
        for n in range(2)
    ]  # fmt: skip
    repository(folder, "RunsenXu/MMSI-Bench", {"default": ("test", mmsi)})
    mindcube = [
        {
            "id": f"{kind}_group1_q0", "category": [], "type": None, "question": "Which way?", "images": [image()] * 2,
            "gt_answer": "B", "grounded_output": "B", "input_prompt": "<image>\n<image>\nWhich way? A. left B. right",
        }
        for kind in ("among", "rotation")
    ]  # fmt: skip
    repository(folder, "oscarqjh/MindCube_lmmseval", {"tiny": ("combined", mindcube)})
    view = [
        {
            "question": "Where?", "choices": "A. left\nB. right", "answer": "A. left", "images": [image()],
            "question_type": "Camera perspective - Relative Direction",
        }
    ] * 2  # fmt: skip
    repository(folder, "oscarqjh/ViewSpatial_lmmseval", {"default": ("test", view)})
    site = {
        "question": "How many?", "answer": "B", "category": "counting & existence", "dataset": "x",
    }  # fmt: skip
    pictures = [
        {**site, "options": ["1", "2"], "visual": ["a.png"]},
        {**site, "options": list("1234"), "visual": ["a.png"]},
    ]
    films = [{**site, "options": ["1", "2"], "visual": ["a.mp4"]}] * 2
    configurations = {"image_test": ("test", pictures), "video_test": ("test", films)}
    repository(folder, "franky-veteran/SITE-Bench", configurations)
    video(folder / "sitebench" / "a.mp4")
    image().save(folder / "sitebench" / "a.png")
    dsr = [
        {
            "index": f"VIN6MS3{n}", "image": image(), "question": "Which is higher?", "A": "cup", "B": "box", "C": None,
            "D": None, "answer": "A", "category": "height_higher",
        }
        for n in range(2)
    ]  # fmt: skip
    repository(folder, "oscarqjh/3DSRBench_lmmseval", {"3dsr": ("test", dsr)})
    embspatial = [
        {
            "question_id": f"mp3d_{n}", "question": "Where?", "image": image(), "relation": "left", "answer": 3,
            "answer_options": ["a", "b", "c", "d"], "data_source": "mp3d", "objects": None,
        }
        for n in range(2)
    ]  # fmt: skip
    repository(folder, "FlagEval/EmbSpatial-Bench", {"default": ("test", embspatial)})


def write_crosspoint(folder: Path) -> None:
    """A question with a letter, and one whose answer is the mask of the lower half."""
    place = folder / "WangYipu2002" / "CrossPoint-Bench"
    (place / "image").mkdir(parents=True)
    image().save(place / "image" / "a.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[SIDE // 2 :] = 255
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    common = {"images": ["a.png", "a.png"], "question": "Is it the same point?", "level": "part"}
    rows = [
        {**common, "type": "Correspondence-Judgement", "answer": "A"},
        {**common, "type": "Correspondence-Pointing", "answer": text},
    ]
    (place / "CrossPoint-Bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


BLINK_CORRESPONDENCE = ("Functional_Correspondence", "Semantic_Correspondence", "Visual_Correspondence")


def write_all(folder: Path) -> Path:
    write_vsi(folder)
    write_cv_bench(folder)
    write_blink(folder, BLINK_CORRESPONDENCE)
    write_videomme(folder)
    write_tempcompass(folder)
    write_nextqa(folder)
    write_all_angles(folder)
    write_easi(folder)
    write_crosspoint(folder)
    return folder

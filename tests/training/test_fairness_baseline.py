"""The fairness baseline shows the model what GASP shows it: the same frames, in the same order, pixel by pixel."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from support.exact_scene import exact_tracks

from gasp_fast.backbones import load_backbone
from gasp_fast.cli.make_vqa import seen_of_frame
from gasp_fast.collator import Collator
from gasp_fast.data.annotations.settings import AnnotationSettings
from gasp_fast.data.annotations.write import annotate
from gasp_fast.data.questions.from_tracks import View, VQAConfig, make_vqa
from gasp_fast.data.scenes.library import find_scenes, survey
from gasp_fast.data.synthetic.scenes import SyntheticConfig, make_scene, write_scene
from gasp_fast.data.tracks.sequences import SequenceConfig
from gasp_fast.train import train
from gasp_fast.training.sources import QAConfig, ScenesConfig
from gasp_fast.training.stream import DataConfig, SampleStream
from gasp_fast.training.workload import frame_counts

LOOK = SyntheticConfig(frames=30, width=224, height=126, samples=1)  # 16:9
SEQUENCES = SequenceConfig(min_frames=18, max_frames=24, window=28, per_scene=6)
ORDERS = ("anchor_first", "chronological")
CHOICES = [
    ("qwen2_5_vl", "images"),
    ("qwen2_5_vl", "video_pairs"),
    ("qwen2_5_vl", "video_doubled"),
    ("llava_next_video", "images"),
]


def numbered(number: int) -> np.ndarray:  # bool [H, W]
    """White digits on black, in the middle of a photograph: no crop cuts them off."""
    board = Image.new("1", (LOOK.width, LOOK.height))
    at = (LOOK.width / 2, LOOK.height / 2)
    ImageDraw.Draw(board).text(at, f"{number:02d}", 1, ImageFont.load_default(80), "mm")
    return np.asarray(board)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A scene with its number painted into each frame, and its annotations."""
    root = tmp_path_factory.mktemp("numbered")
    write_scene(make_scene(0, LOOK), root / "scenes" / "scene-0")
    for path in (root / "scenes" / "scene-0" / "color").iterdir():
        photograph = np.asarray(Image.open(path)).copy()
        photograph[:, 52:172] = 255 * numbered(int(path.stem))[:, 52:172, None]
        Image.fromarray(photograph).save(path, quality=95)
    entries = tuple(survey(root / "scenes", find_scenes(root / "scenes")))
    list(annotate(root / "scenes", root / "tracks", AnnotationSettings(scenes=entries, sequences=SEQUENCES, grid=24)))
    return root


def questions_for(backbone, library: Path, out: Path, order: str = "anchor_first") -> Path:
    view = View("tiny", lambda width, height: seen_of_frame(backbone, width, height))
    list(make_vqa(library / "scenes", library / "tracks", out, VQAConfig(order=order, turns=8), view=view))
    return out


def data_of(library: Path, questions: Path, order: str = "anchor_first") -> DataConfig:
    scenes = ScenesConfig(root=str(library / "scenes"), annotations=(str(library / "tracks"),), order=order)
    return DataConfig(scenes=scenes, vqa=QAConfig(root=str(questions), frames=None), workers=0)


def images_of(inputs: dict[str, torch.Tensor], frames_as: str) -> torch.Tensor:
    """The frames that a model receives, `[F, 3, H, W]`, in its order. A last frame that pairs repeat comes twice."""
    if "video_grid_thw" not in inputs and "pixel_values_videos" in inputs:  # LLaVA
        return inputs["pixel_values_videos"][0]
    kind = ("pixel_values", "image_grid_thw") if frames_as == "images" else ("pixel_values_videos", "video_grid_thw")
    patches, grids = (inputs[name] for name in kind)
    edge, frames = int((patches.shape[1] / 6) ** 0.5), []
    for part, (times, rows, columns) in zip(patches.split(grids.prod(1).tolist()), grids.tolist(), strict=True):
        blocks = part.view(times, rows // 2, columns // 2, 2, 2, 3, 2, edge, edge)
        both = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(times * 2, 3, rows * edge, columns * edge)
        frames.append(both if frames_as == "video_pairs" else both[::2])
    return torch.cat(frames)


def number_in(image: torch.Tensor, seen: tuple[float, ...]) -> int:
    """The number that is painted into what the model sees of a frame."""
    pixels = image.mean(0).numpy()
    boards = [Image.fromarray(numbered(number)).convert("F") for number in range(LOOK.frames)]
    shown = [np.asarray(one.resize(pixels.shape[::-1], Image.Resampling.BOX, seen)) for one in boards]
    return int(np.argmax([np.corrcoef(pixels.ravel(), one.ravel())[0, 1] for one in shown]))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("family", "frames_as"), CHOICES)
def test_both_recipes_give_the_model_the_same_pixels(config, library, tmp_path, family, frames_as, order):
    backbone = load_backbone(config(family).model.source, 96 * 96 if family == "qwen2_5_vl" else None, frames_as)
    stream = SampleStream(data_of(library, questions_for(backbone, library, tmp_path / "vqa", order), order))
    collate, counts = Collator(backbone), set()
    for index in range(SEQUENCES.per_scene):
        tracked, asked = (stream.sources[name].load(0, index, 0) for name in ("scenes", "vqa"))
        assert tracked.tracks and not asked.tracks and len(asked.messages) > 4
        ours, theirs = collate([tracked]), collate([asked])
        for name in [name for name in ours if "pixel" in name or "grid" in name]:
            assert torch.equal(ours[name], theirs[name])
        assert len(images_of(ours, frames_as)) - len(tracked.frames) in (0, frames_as == "video_pairs")
        counts.add(len(tracked.frames))
    assert len(counts) > 1 and min(counts) > 16


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("family", "frames_as"), CHOICES)
def test_image_k_of_a_text_is_the_kth_image_that_the_model_receives(
    config, library, tmp_path, family, frames_as, order
):
    """The number painted into an image says which frame it is; the exact scene, where the point is in that frame."""
    backbone = load_backbone(config(family).model.source, frames_as=frames_as)
    stream = SampleStream(data_of(library, questions_for(backbone, library, tmp_path / "vqa", order), order))
    seen = backbone.frame_grid(LOOK.width, LOOK.height).rectangle
    left_top, size = np.array(seen[:2]), np.array(seen[2:]) - np.array(seen[:2])
    scene, collate, asked_about, errors = make_scene(0, LOOK), Collator(backbone), set(), []
    for index in range(SEQUENCES.per_scene):
        sample = stream.sources["vqa"].load(0, index, 0)
        images = images_of(collate([sample]), frames_as)[: len(sample.frames)]
        numbers = [number_in(image, seen) for image in images]
        assert len(set(numbers)) == len(numbers) and (numbers == sorted(numbers) or order == "anchor_first")
        assert f"These are {len(numbers)} images" in sample.messages[0]["content"]
        for question, answer in zip(sample.messages[::2], sample.messages[1::2], strict=True):
            if "Where does the same point lie" in question["content"]:
                asked = re.findall(r"\[(\d+), (\d+)\]", question["content"])[-1]
                begin, image = (int(number) for number in re.findall(r"in image (\d+)", question["content"])[-2:])
                query = left_top + np.array(asked, int) / 1000 * size
                exact = exact_tracks(scene, [numbers[begin - 1], numbers[image - 1]], query[None]).uv[0, 1]
                place = np.array(re.findall(r"\d+", answer["content"]), int) / 1000 * size + left_top
                errors.append(float(np.abs(place - exact).max()))
                asked_about.add(image)
    assert len(errors) > 8 and max(asked_about) > 16
    assert np.median(errors) < 1.5 and np.mean(np.array(errors) < 3) > 0.9


def test_questions_for_another_model_are_refused(config, library, tmp_path):
    """LLaVA crops frames; Qwen sees them whole."""
    qwen, llava = (load_backbone(config(name).model.source) for name in ("qwen2_5_vl", "llava_next_video"))
    for name, backbone, other in (("a", qwen, "llava_next_video"), ("b", llava, "qwen2_5_vl")):
        questions = questions_for(backbone, library, tmp_path / name)
        settings = replace(config(other, loss={"corr_weight": 0, "depth_weight": 0}), data=data_of(library, questions))
        with pytest.raises(ValueError, match=r"data\.vqa\.root = .* asks about the part .* make-vqa --model"):
            train(settings)


def test_frames_of_scenes_need_the_scenes(library):
    with pytest.raises(ValueError, match=r"data\.vqa\.frames = null takes frames of scenes; give data\.scenes\.root"):
        DataConfig(vqa=QAConfig(root=str(library), frames=None), workers=0)


def test_a_plan_counts_all_frames_of_a_question_about_a_sequence(config):
    settings = config()
    scenes = settings.data.scenes
    about_frames = QAConfig(root="x", frames=None)
    assert list(frame_counts(settings, about_frames)) == list(frame_counts(settings, scenes)) == [3]
    assert list(frame_counts(settings, QAConfig(root="x"))) == [16]


def test_a_run_trains_on_questions_about_frames_and_skips_a_scene_that_has_changed(config, library, tmp_path):
    settings = config(loss={"corr_weight": 0, "depth_weight": 0})
    questions = questions_for(load_backbone(settings.model.source), library, tmp_path / "vqa")
    data = data_of(library, questions)
    train(replace(settings, data=replace(data, scenes=replace(data.scenes, only_counted=True))))
    stream = SampleStream(data)
    record = sorted(questions.glob("records-*.json"))[0]
    record.write_text(record.read_text().replace('"digest": "', '"digest": "0', 1))
    sample = SampleStream(data).sources["vqa"].sample(0, 0, 0)
    assert [(one.kind, "has changed" in one.reason) for one in sample.skipped] == [("scene", True)]
    assert stream.sources["vqa"].outline(0, 1).frames == len(stream.sources["vqa"].load(0, 1, 0).frames)
    assert stream.sources["vqa"].frame_size_of(1) == (LOOK.width, LOOK.height)

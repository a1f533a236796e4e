"""LLaVA-Video-178K's layout is read, and damaged records and videos are skipped and named."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gasp_fast.data.questions.scene_frames import FrameReader, SceneFrames
from gasp_fast.data.questions.video_qa import QARecord, VideoQA, record_json
from gasp_fast.data.video.write import write_clip

CONFIGS = ("0_30_s_academic_v0_1", "0_30_s_youtube_v0_1")


def record(identity: str, video: str = "source/good.mp4", **changes: Any) -> dict[str, Any]:
    talk = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": f"It is {identity}."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes – sure."},
    ]
    return {"id": identity, "conversations": talk, "data_source": "here", "video": video, **changes}


def talk(question: str, answer: str = "yes") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def clip(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path, [np.full((32, 48, 3), grey + frame, np.uint8) for frame in range(12)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two configs as on the hub. In the second, one video is truncated, one empty, one missing and one a text file."""
    first, second = tmp_path / CONFIGS[0], tmp_path / CONFIGS[1]
    clip(first / "source" / "good.mp4", 50)
    clip(second / "source" / "good.mp4", 120)
    clip(tmp_path / "shared" / "both.mp4", 200)
    whole = (second / "source" / "good.mp4").read_bytes()
    (second / "source" / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    (second / "source" / "empty.mp4").write_bytes(b"")
    (second / "source" / "text.mp4").write_text("no video at all")
    (first / "oe_processed.json").write_text(json.dumps([record("a"), record("b")]))
    (first / "mc_processed.json").write_text(json.dumps([record("c", "shared/both.mp4")]))
    names = ("cut", "empty", "missing", "text", "good")
    (second / "qa.jsonl").write_text("\n".join(json.dumps(record(n, f"source/{n}.mp4")) for n in names) + "\n")
    return tmp_path


def test_all_configs_are_read_in_a_fixed_order(root: Path) -> None:
    data = VideoQA(root)
    assert [data.record(i).id for i in range(len(data))] == ["c", "a", "b", "cut", "empty", "missing", "text", "good"]
    assert data.record(1).turns[3].text == "Yes – sure."
    assert [turn.speaker for turn in data.record(1).turns] == ["human", "gpt", "human", "gpt"]


def test_configs_can_be_chosen(root: Path) -> None:
    assert len(VideoQA(root, configs=[CONFIGS[0]])) == 3
    with pytest.raises(OSError, match="no config 'nowhere'"):
        VideoQA(root, configs=["nowhere"])


def test_a_video_is_searched_beside_its_list_and_then_under_the_root(root: Path) -> None:
    data = VideoQA(root)
    greys = {data.record(i).id: data.sample(i, frames=4).frames[0].mean() for i in (0, 1, 7)}
    assert greys == {"c": pytest.approx(200, abs=3), "a": pytest.approx(50, abs=3), "good": pytest.approx(120, abs=3)}


def test_frames_spread_over_the_clip(root: Path) -> None:
    frames = VideoQA(root).sample(1, frames=4).frames
    assert frames.shape == (4, 32, 48, 3)
    grey = frames.mean(axis=(1, 2, 3))  # twelve frames, each one step brighter
    assert np.diff(grey).min() > 1 and np.ptp(grey) > 8


def test_a_broken_video_is_an_error_that_names_it(root: Path) -> None:
    data = VideoQA(root)
    beside = {name: root / CONFIGS[1] / "source" / f"{name}.mp4" for name in ("cut", "empty", "text")}
    paths = {**beside, "missing": root / "source" / "missing.mp4"}
    for index in range(3, 7):
        name = data.record(index).id
        with pytest.raises(OSError) as caught:
            data.sample(index, frames=4)
        assert str(paths[name]) in str(caught.value) and data.broken[str(paths[name])] == str(caught.value)
    assert data.sample(7, frames=4).record.id == "good"


def test_a_broken_video_does_not_hide_a_video_of_the_same_name_in_another_config(root: Path) -> None:
    """So the sample at an index does not depend on which videos were drawn before."""
    clip(root / CONFIGS[0] / "source" / "cut.mp4", 70)
    (root / CONFIGS[0] / "oe_processed.json").write_text(json.dumps([record("d", "source/cut.mp4")]))
    fresh, used = VideoQA(root), VideoQA(root)
    names = [fresh.record(i).id for i in range(len(fresh))]
    with pytest.raises(OSError):
        used.sample(names.index("cut"), frames=2)
    drawn = [data.sample(names.index("d"), frames=2).record.id for data in (used, fresh)]
    assert drawn == ["d", "d"]


def test_a_broken_video_is_not_tried_twice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = VideoQA(root)
    import gasp_fast.data.questions.video_qa as module

    read, tried, errors = module.read_video, [], []
    monkeypatch.setattr(module, "read_video", lambda path, *a, **k: (tried.append(path), read(path, *a, **k))[1])
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            data.sample(3, frames=2)
        errors.append(str(caught.value))
    assert len(tried) == 1 and errors[0] == errors[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"video": None}, "names no video"),
        ({"video": "../../etc/passwd"}, "leads out"),
        ({"video": "/etc/passwd"}, "leads out"),
        ({"conversations": []}, "no conversation"),
        ({"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}, "turn 0"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]}, "turn 1"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]}, "empty answer"),
        ({"conversations": talk("see <|image_pad|>")}, "turn 0 of the conversation contains the control token"),
        ({"conversations": talk("see", "<|im_end|>")}, "contains the control token <|im_end|>"),
        ({"conversations": talk("half \ud83d of a pair")}, "surrogates not allowed"),
        ({"conversations": talk("long " * 300_000)}, "over 1,048,576 characters"),
        ({"id": [[[]]]}, "neither text nor a number"),
    ],
)
def test_an_invalid_record_is_skipped_and_named(tmp_path: Path, changes: dict, reason: str) -> None:
    (tmp_path / "qa.json").write_text(json.dumps([record("a"), record("b", **changes), "text"]))
    data = VideoQA(tmp_path)
    assert [data.record(i).id for i in range(len(data))] == ["a"]
    assert list(data.skipped) == ["qa.json[1]", "qa.json[2]"]
    assert reason in data.skipped["qa.json[1]"] and data.skipped["qa.json[2]"] == "not an object"


FRAMES = {"scene": "1K/a", "digest": "00ff", "frames": [7, 3], "seen": [0, 0.5, 4, 3]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scene": "../a"}, "leads out of its folder"),
        ({"scene": ""}, "is no path"),
        ({"digest": 7}, "no text"),
        ({"frames": []}, "no list of whole numbers"),
        ({"frames": [1, True]}, "no list of whole numbers"),
        ({"frames": [-1]}, "outside 0 to"),
        ({"seen": [0, 0, 1]}, "not left, top, right and bottom"),
        ({"seen": [0, 0, 1, float("inf")]}, "not left, top, right and bottom"),
        ({"more": 1}, "without scene, digest, frames and seen"),
    ],
)
def test_a_record_that_names_no_frames_is_skipped_and_named(tmp_path: Path, changes: dict, reason: str) -> None:
    written = [record_json(str(n), ("Where?", "There."), "", SceneFrames("1K/a", "00ff", (7, 3), (0, 0.5, 4, 3)))
               for n in range(2)]  # fmt: skip
    written[1]["images"] = {**FRAMES, **changes}
    (tmp_path / "qa.json").write_text(json.dumps(written))
    data = VideoQA(tmp_path, reader=FrameReader(tmp_path))
    assert len(data) == 1 and data.record(0).about.to_json() == {**FRAMES, "frames": (7, 3), "seen": (0, 0.5, 4, 3)}
    assert list(data.skipped) == ["qa.json[1]"] and reason in data.skipped["qa.json[1]"]


def test_videos_and_frames_of_scenes_are_not_read_in_place_of_each_other(tmp_path: Path) -> None:
    written = [record("a"), record_json("b", ("Where?", "There."), "", SceneFrames("s", "", (0,), (0, 0, 1, 1)))]
    (tmp_path / "qa.json").write_text(json.dumps(written))
    videos, frames = VideoQA(tmp_path), VideoQA(tmp_path, reader=FrameReader(tmp_path))
    assert [one.record(0).id for one in (videos, frames)] == ["a", "b"] and len(videos) == len(frames) == 1
    assert "frames: null" in videos.skipped["qa.json[1]"] and "names a video" in frames.skipped["qa.json[0]"]


def test_numbers_as_identities_and_unknown_keys_are_accepted() -> None:
    read = QARecord.from_json(record("a", id=17, more=[1, 2]))
    assert read.id == "17"


def test_files_that_are_no_lists_are_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no JSON lists"):
        VideoQA(tmp_path)
    (tmp_path / "qa.json").write_text("{}")
    with pytest.raises(ValueError, match="not a list of records"):
        VideoQA(tmp_path)
    (tmp_path / "qa.json").write_text("[{")
    with pytest.raises(ValueError, match=r"qa\.json: not JSON"):
        VideoQA(tmp_path)
    (tmp_path / "qa.json").write_text("[3]")
    with pytest.raises(ValueError, match=r"none of 1 records can be used; the first: qa.json\[0\]"):
        VideoQA(tmp_path)
    with pytest.raises(OSError, match="no such folder"):
        VideoQA(tmp_path / "nowhere")


def test_a_damaged_line_costs_its_record_and_not_the_list(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    lines = [json.dumps(record("a")), '{"id": ', "[" * 100_000, json.dumps(record("b", id=7))]
    (tmp_path / "sub" / "qa.jsonl").write_text("\n".join(lines))
    data = VideoQA(tmp_path)
    assert [data.record(i).id for i in range(len(data))] == ["a", "7"]
    assert list(data.skipped) == ["sub/qa.jsonl[1]", "sub/qa.jsonl[2]"]


@pytest.mark.parametrize("text", ["[" * 100_000, "[1" + "0" * 5000 + "]"])
def test_a_list_that_no_parser_takes_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "qa.json").write_text(text)
    with pytest.raises(ValueError, match=r"qa\.json: not JSON") as caught:
        VideoQA(tmp_path)
    assert len(str(caught.value)) < 300


def test_a_pipe_in_place_of_a_list_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "qa.json")
    os.mkfifo(tmp_path / "qa.jsonl")
    for name in ("qa.json", "qa.jsonl"):
        with pytest.raises(OSError, match=f"{name}.*not a regular file"):
            VideoQA(tmp_path)
        (tmp_path / name).unlink()


def test_many_records_stay_small_and_pickle_as_they_are(tmp_path: Path) -> None:
    records = [record(f"{n:06d}") for n in range(20_000)]
    (tmp_path / "qa.json").write_text(json.dumps(records))
    data = VideoQA(tmp_path)
    assert len(pickle.dumps(data)) < 1.05 * (tmp_path / "qa.json").stat().st_size
    twin = pickle.loads(pickle.dumps(data))
    assert twin.record(19_999) == data.record(19_999) == QARecord.from_json(records[-1])


def test_a_written_record_is_read_back() -> None:
    written = record_json("a", ("<image>\nWhat is it?", "A box."), "here", "a.mp4")
    read = QARecord.from_json(json.loads(json.dumps(written)))
    assert (read.id, read.about) == ("a", "a.mp4")
    assert [(turn.speaker, turn.text) for turn in read.turns] == [("human", "<image>\nWhat is it?"), ("gpt", "A box.")]


def messages(question: Any, answer: str = "A cat.", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


@pytest.mark.parametrize(
    "fields",
    [
        messages("<video>What is it?", videos=["good.mp4"]),
        messages("What is it?", video="good.mp4"),
        messages([{"type": "video", "video": "good.mp4"}, {"type": "text", "text": "What is it?"}]),
    ],
)
def test_records_with_messages_are_read_like_conversations(root: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = tmp_path / "chat"
    clip(folder / "good.mp4", 90)
    (folder / "chat.json").write_text(json.dumps([fields]))
    data = VideoQA(folder)
    assert [turn.speaker for turn in data.record(0).turns] == ["human", "gpt"]
    assert data.record(0).turns[0].text.replace("\n", "") == "<image>What is it?"
    assert data.record(0).turns[1].text == "A cat." and len(data.sample(0, 4).frames) == 4


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (messages("a", video="a.mp4", videos=["b.mp4"]), "names 2 videos; one is read"),
        (messages("a"), "names 0 videos"),
        (messages([{"type": "image"}], video="a.mp4"), "message 0 has content that is neither text nor a video"),
        ({"messages": [{"role": "system", "content": "a"}], "video": "a.mp4"}, "message 0 is not of user or assistant"),
        ({"messages": "a", "video": "a.mp4"}, "messages is not a list"),
    ],
)
def test_messages_that_cannot_be_read_are_skipped_and_named(tmp_path: Path, fields: dict, reason: str) -> None:
    (tmp_path / "chat.json").write_text(json.dumps([fields, record("a")]))
    data = VideoQA(tmp_path)
    assert len(data) == 1 and reason in data.skipped["chat.json[0]"]


def test_absolute_paths_lead_into_the_stated_folder_of_videos(root: Path, tmp_path: Path) -> None:
    videos = tmp_path / "elsewhere"
    clip(videos / "deep" / "a.mp4", 30)
    named = [str(videos / "deep" / "a.mp4"), "deep/a.mp4", "/etc/passwd", f"{videos}/../shared/both.mp4", "../x.mp4"]
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "qa.json").write_text(json.dumps([record(str(n), path) for n, path in enumerate(named)]))
    data = VideoQA(folder, videos=videos)
    assert [data.video_path(i) for i in range(len(data))] == [videos / "deep" / "a.mp4"] * 2
    assert len(data.sample(0, 4).frames) == 4
    assert list(data.skipped) == ["qa.json[2]", "qa.json[3]", "qa.json[4]"]
    assert "is not in" in data.skipped["qa.json[3]"]
    without = VideoQA(folder)
    assert len(without) == 1 and "data.qa.videos" in without.skipped["qa.json[0]"]

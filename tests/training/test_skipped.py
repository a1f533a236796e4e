"""One bad record never ends a run: it is replaced, counted and named, the same way however the run is divided."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.runs import children_of, launch, log_of, wait_for, without_clock, write_config

from gasp_fast.backbones import load_backbone
from gasp_fast.collator import Collator
from gasp_fast.config.loader import to_yaml
from gasp_fast.data.video.write import write_clip
from gasp_fast.run_folder import SKIPPED
from gasp_fast.train import main, train
from gasp_fast.training.guards import check_left_out
from gasp_fast.training.loader import ReplacingCollator, SteadyCollator, make_loader
from gasp_fast.training.log import in_words
from gasp_fast.training.skipped import Skipped, SkippedFile, join
from gasp_fast.training.stream import SampleStream, Share

LONG = "and so on " * 30_000  # more tokens than the models take


@pytest.fixture
def questions(assets, tmp_path):
    """A copy of the questions, and what changes them: `spoil(text, ...)` puts each text into a question of its own."""
    root = tmp_path / "questions"
    shutil.copytree(assets.questions, root)

    def spoil(*texts):
        records = json.loads((root / "qa.json").read_text())
        for number, text in enumerate(texts):
            records[3 * number]["conversations"][0]["value"] += text
        (root / "qa.json").write_text(json.dumps(records))
        return [f"{root}/qa.json[{3 * number}]" for number in range(len(texts))]

    return root, spoil


def batches_of(settings, steps=12, workers=0):
    backbone = load_backbone(settings.model.source)
    share = Share(0, 1, settings.train.batch_size, settings.train.micro_batch_size)
    data = replace(settings.data, workers=workers)
    return make_loader(data, SampleStream(data), backbone, share, steps, pin_memory=False)


def skipped_in(batches):
    return [one for batch in batches for one in batch.get("skipped", ())]


@pytest.mark.parametrize(
    ("family", "texts", "reasons"),
    [
        ("qwen2_5_vl", [LONG, "<|image_pad|>"], ["16384", None]),  # the second is found when the list is read
        ("llava_next_video", ["<ima<image>ge>", "</s>", "<pa<video>d>"], ["'<image>'", "'</s>'", "'<pad>'"]),
    ],
    indirect=["family"],
)
def test_questions_that_no_model_can_read_are_replaced_and_named(config, questions, family, texts, reasons):
    root, spoil = questions
    named = spoil(*texts)
    settings = config(family, mixed=True, scenes={"root": ""}, qa={"root": str(root)})
    expected = {name: reason for name, reason in zip(named, reasons, strict=True) if reason}
    steps = len(SampleStream(settings.data).sources["qa"])  # two epochs
    batches = list(batches_of(settings, steps))
    faults = {one.record: one.reason for one in skipped_in(batches)}
    assert faults.keys() == expected.keys() and all(expected[name] in faults[name] for name in faults)
    assert {one.kind for one in skipped_in(batches)} == {"question"}
    positions = [one.position for one in skipped_in(batches)]
    assert len(positions) >= 2 * len(expected) and positions == sorted(positions)
    assert all((batch["labels"] != -100).any() for batch in batches)


def test_a_question_about_a_photograph_of_extreme_shape_is_replaced(config, questions):
    root, _ = questions
    videos = sorted(root.rglob("*.mp4"))
    write_clip(videos[0], [np.zeros((8, 1616, 3), np.uint8)] * 3)  # 202 : 1
    settings = config(mixed=True, scenes={"root": ""}, qa={"root": str(root)})
    faults = skipped_in(batches_of(settings))
    assert faults and all(one.kind == "video" and "one side is over 200 times" in one.reason for one in faults)


def test_the_samples_of_a_step_do_not_depend_on_how_it_is_divided(config, questions):
    root, spoil = questions
    spoil(LONG, LONG, LONG)
    settings = config(mixed=True, qa={"root": str(root)}, train={"batch_size": 4})
    rows, faults = [], []
    for micro, workers in ((1, 0), (2, 0), (4, 1)):
        divided = replace(settings, train=replace(settings.train, micro_batch_size=micro))
        batches = list(batches_of(divided, 6, workers))
        faults.append(skipped_in(batches))
        real = [
            row[mask.bool()]
            for batch in batches
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        rows.append([row.tolist() for row in real])
    assert faults[0] and faults[0] == faults[1] == faults[2]
    assert rows[0] == rows[1] == rows[2]


def test_a_sample_that_fails_only_beside_another_is_replaced_too(config, questions):
    root, _ = questions
    settings = config(mixed=True, scenes={"root": ""}, qa={"root": str(root)})
    stream = SampleStream(settings.data)
    collate = SteadyCollator(Collator(load_backbone(settings.model.source)))
    samples = [stream[position] for position in range(3)]

    def picky(batch):
        if any(sample.index == samples[1].index for sample in batch[1:]):
            raise RuntimeError("only\nalone")
        return collate(batch)

    batch = ReplacingCollator(picky, stream)(samples)
    assert len(batch["input_ids"]) == 3
    (fault,) = batch["skipped"]
    assert fault == Skipped("question", f"{root}/{stream.sources['qa'].name(samples[1].index)}", "only alone", 1)


def test_a_model_that_can_read_no_sample_ends_the_run_with_a_line(config, tmp_path, capsys, monkeypatch):
    """In the process itself and in a loader worker, whose errors have the worker's traceback."""
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config(family="llava_next_video")))
    for workers in (0, 1):
        status = main([str(path), f"data.workers={workers}", "data.collator.prompt=a </s> b"])
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert status == 1 and line.startswith("gasp_fast.train: ") and "Traceback" not in line
        assert "none of 9 samples can be used; the last, sequence " in line
        assert line.endswith("a message contains '</s>', a special token of this model; remove it")


def test_a_killed_loader_worker_ends_the_run_with_a_line(config, tmp_path):
    settings = config(train={"steps": 500})
    settings = replace(settings, data=replace(settings.data, workers=1))
    process = launch(1, "-m", "gasp_fast.train", write_config(settings, tmp_path / "c.yaml"))
    wait_for(process, settings.run.out, 2, 120)
    (server,) = [child for child in children_of(process) if "forkserver" in Path(f"/proc/{child}/cmdline").read_text()]
    workers = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in output, output
    assert output.startswith("gasp_fast.train: a loader worker was killed (") and output.count("\n") == 1


# ---- in the log -----------------------------------------------------------------------------------------------------


def spoiled_run(config, assets, questions, tmp_path, **run):
    """A run with unusable samples of every kind."""
    root, spoil = questions
    spoil(LONG, LONG, "<|image_pad|>")
    sorted(root.rglob("*.mp4"))[-1].write_bytes(b"")
    library = tmp_path / "library"
    shutil.copytree(assets.scenes, library)
    for image in sorted((library / "scene-1" / "color").iterdir())[4:7]:
        image.write_bytes(b"")
    (library / "scene-2" / "meta.json").write_text("{")
    return config(
        mixed=True, scenes={"root": str(library)}, qa={"root": str(root)}, train={"steps": 12, "batch_size": 4},
        run={"save_every": 4, "max_skipped": 0.25, **run},
    )  # fmt: skip


def entries_of(out):
    return [json.loads(line) for line in (Path(out) / SKIPPED).read_text().splitlines()]


def test_skipped_samples_are_counted_in_the_log_and_named_in_a_file(config, assets, questions, tmp_path, capsys):
    settings = spoiled_run(config, assets, questions, tmp_path, log_every=5, progress=True)
    train(settings)
    printed = capsys.readouterr().err
    entries, records = entries_of(settings.run.out), log_of(settings.run.out)
    before, during = [e for e in entries if not e["step"]], [e for e in entries if e["step"]]
    assert [(e["kind"], e["position"]) for e in before] == [("scene", None), ("question", None)]
    assert {e["kind"] for e in during} == {"scene", "video", "question"}
    assert all(e["step"] == e["position"] // 4 + 1 and e["record"] and e["reason"] for e in during)
    assert len({(e["kind"], e["record"]) for e in entries}) == len(entries)
    expected = {}  # the first fault of each position
    for one in reversed(skipped_in(batches_of(settings))):
        expected[one.position] = one
    for record, steps in zip(records, (range(1, 2), range(2, 6), range(6, 11), range(11, 13)), strict=True):
        kinds = [one.kind for one in expected.values() if one.position // 4 + 1 in steps]
        assert record["skipped"] == {kind: kinds.count(kind) for kind in record["skipped"]}
        assert sum(record["skipped"].values()) == len(kinds)
        assert 0 <= record["data_wait"] <= 1 and record["device_wait"] is None
    for kind in ("scene", "video", "question"):
        first = next(e for e in during if e["kind"] == kind)
        line = f"gasp_fast.train: step {first['step']}: skipped {kind} {first['record']}: "
        assert sum(text.startswith(line) for text in printed.splitlines()) == 1
        assert sum(f": skipped {kind} " in text for text in printed.splitlines()) == 1
    totals = {kind: sum(record["skipped"].get(kind, 0) for record in records) for kind in ("scene", "video")}
    assert f"left out before the run 1 scene, 1 question; replaced while it ran {totals['scene']} scene" in printed
    assert "data.qa: 1 of " in printed and "data.scenes: 1 of 4 cannot be used" in printed
    assert "skipped 1" in in_words({**records[0], "skipped": {"video": 1}})


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_counts_and_names_what_the_whole_run_does(config, assets, questions, tmp_path, processes):
    whole = spoiled_run(config, assets, questions, tmp_path, log_every=3)
    broken = replace(whole, run=replace(whole.run, out=str(tmp_path / "broken")))
    paths = [write_config(settings, tmp_path / f"{n}.yaml") for n, settings in enumerate((whole, broken))]
    output, _ = launch(processes, "-m", "gasp_fast.train", paths[0]).communicate(timeout=200)
    process = launch(processes, "-m", "gasp_fast.train", paths[1])
    wait_for(process, broken.run.out, 6, 200)
    process.kill()
    process.communicate()
    process = launch(processes, "-m", "gasp_fast.train", paths[1])
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]
    assert entries_of(broken.run.out) == entries_of(whole.run.out)
    assert without_clock(log_of(broken.run.out)) == without_clock(log_of(whole.run.out))
    assert any(record["skipped"] for record in without_clock(log_of(whole.run.out)))
    assert [path.name for path in Path(whole.run.out).glob("skipped*")] == [SKIPPED]


def test_the_files_of_all_processes_are_joined_in_the_order_of_the_stream(tmp_path):
    scene, video = Skipped("scene", "a", "r", 5), Skipped("video", "v", "r", 2)
    SkippedFile(tmp_path, 0, 4).add([scene, Skipped("scene", "b", "r")])
    SkippedFile(tmp_path, 3, 4).add([video, video, replace(scene, position=1)])
    (tmp_path / "skipped-4.jsonl").write_text('{"step": 1, "position": 3, "kind": "no\n[]\n{"kind": "scene"}\n')
    join(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [SKIPPED]
    assert [(e["step"], e["position"], e["record"]) for e in entries_of(tmp_path)] == [
        (0, None, "b"), (1, 1, "a"), (1, 2, "v"),
    ]  # fmt: skip
    join(tmp_path, done=1)
    assert [e["record"] for e in entries_of(tmp_path)] == ["a", "v"]
    join(tmp_path, done=0)
    assert entries_of(tmp_path) == []


# ---- too many -------------------------------------------------------------------------------------------------------


def test_more_than_the_allowed_share_ends_the_run_and_a_resumed_run_counts_on(config, questions, tmp_path, capsys):
    root, _ = questions
    sorted(root.rglob("*.mp4"))[0].write_bytes(b"")
    settings = config(
        mixed=True, scenes={"root": ""}, qa={"root": str(root)}, train={"steps": 12, "batch_size": 4},
        run={"max_skipped": 0.02, "save_every": 1},  # 4 of 200
    )  # fmt: skip
    faults = {one.position for one in skipped_in(batches_of(settings))}
    step = next(step for step in range(1, 13) if sum(position < 4 * step for position in faults) > 4)
    count = sum(position < 4 * step for position in faults)
    message = rf"step {step}: {count} of {4 * step} samples could not be used, run.max_skipped = 0.02; .*skipped.jsonl"
    with pytest.raises(ValueError, match=message):
        train(settings)
    with pytest.raises(ValueError, match=rf"step \d+: {count} of \d+ samples could not be used"):
        train(settings)
    train(replace(settings, run=replace(settings.run, max_skipped=0.1)))
    assert sum(sum(record["skipped"].values()) for record in log_of(settings.run.out)) == len(faults)


def test_data_of_which_too_much_cannot_be_used_is_refused_before_the_run(config, questions):
    root, spoil = questions
    spoil("<|image_pad|>")
    settings = config(mixed=True, qa={"root": str(root)}, run={"max_skipped": 0.0})
    with pytest.raises(
        ValueError, match=r"data\.qa: 1 of \d+ cannot be used; the first, question .*qa\.json\[0\].*raise"
    ):
        train(settings)
    with pytest.raises(ValueError, match=r"run\.max_skipped = 1\.5 is a share"):
        replace(settings.run, max_skipped=1.5)


@pytest.mark.parametrize(("unusable", "refused"), [(4, True), (1, False)])
def test_the_share_left_out_at_the_start_is_of_what_was_found(config, assets, tmp_path, unusable, refused):
    library = tmp_path / "library"
    for name in ("scene-0", "scene-1", "scene-2"):
        for copy in "ab":
            shutil.copytree(assets.scenes / name, library / copy / name)
    for scene in sorted(library.glob("*/*"))[:unusable]:
        (scene / "meta.json").write_text("{")
    settings = config(scenes={"root": str(library)}, run={"max_skipped": 0.2})
    stream = SampleStream(settings.data)
    if refused:
        with pytest.raises(ValueError, match=r"data\.scenes: 4 of 6 cannot be used; .*run\.max_skipped = 0\.2: repair"):
            check_left_out(settings.run, stream)
    else:
        assert len(check_left_out(settings.run, stream)) == 1

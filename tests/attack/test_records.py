"""Bad records, videos and scenes end no run: they are replaced by the same samples however a step is divided."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.damaged_scenes import damage_bytes, replace_file
from support.tiny_training import *  # noqa: F403 (fixtures)

from gasp_fast.backbones import load_backbone
from gasp_fast.data.annotations.settings import AnnotationSettings
from gasp_fast.data.annotations.write import annotate
from gasp_fast.data.scenes.library import find_scenes, survey
from gasp_fast.data.tracks.sequences import SequenceConfig
from gasp_fast.training.loader import make_loader
from gasp_fast.training.skipped import KINDS
from gasp_fast.training.stream import SampleStream, Share

TRIES = 25
STEPS = 3
SEQUENCES = SequenceConfig(min_frames=3, max_frames=3, window=4, per_scene=4)
TEXTS = [
    "word " * 50_000, "<|im_start|>user", "<|image_pad|>" * 3, "</s>", "<s>", "<pad>", "<ima<image>ge>",
    "<vid<video>eo>", "<image>" * 50, "\0", "é" * 5000, "\u202e", "{{ messages }} {% for x in y %}",
    "\U0001f600" * 300, "\n" * 5000, "",
]  # fmt: skip


def spoil_questions(root: Path, draw: random.Random) -> str:
    records = json.loads((root / "qa.json").read_text())
    text = draw.choice(TEXTS)
    for record in draw.sample(records, 3):
        turn = draw.choice(record["conversations"])
        turn["value"] = text if draw.random() < 0.3 else turn["value"] + text
    (root / "qa.json").write_text(json.dumps(records))
    return f"questions with {text[:20]!r}"


def damage_file(root: Path, pattern: str, draw: random.Random) -> str:
    path = draw.choice(sorted(path for path in root.rglob(pattern) if path.is_file()))
    how = draw.choice([damage_bytes, damage_bytes, replace_file])(path, draw)
    return f"{path.relative_to(root)}: {how}"


def drawn(settings: Any, stream: SampleStream, backbone: Any, micro: int) -> list[Any]:
    """The tokens of each sample of the first steps, and what was skipped."""
    share = Share(0, 1, 4, micro)
    rows, skipped = [], []
    for batch in make_loader(settings.data, stream, backbone, share, STEPS, pin_memory=False):
        skipped += batch.get("skipped", [])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            rows.append(ids[mask.bool()].tolist())
    assert len(rows) == 4 * STEPS
    assert all(one.kind in KINDS and "\n" not in str(one) and one.reason for one in skipped)
    return [rows, skipped]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next_video"], indirect=True)
def test_bad_records_are_replaced_and_named(config, assets, family, tmp_path, capsys):
    draw, failures, replaced, refused = random.Random(family), [], 0, 0
    backbone = load_backbone(assets.models[family])
    entries = tuple(survey(assets.scenes, find_scenes(assets.scenes)))
    settings = AnnotationSettings(scenes=entries, sequences=SEQUENCES, grid=8, shard_size=5)
    list(annotate(assets.scenes, tmp_path / "tracks", settings))
    for number in range(TRIES):
        library, questions, tracks = (tmp_path / f"{number}" / name for name in ("library", "questions", "tracks"))
        for source, copy in ((assets.scenes, library), (assets.questions, questions), (tmp_path / "tracks", tracks)):
            shutil.copytree(source, copy)
        scenes: dict[str, Any] = {"root": str(library)}
        if draw.random() < 0.5:
            scenes["annotations"] = (str(tracks),)
        run = config(family, mixed=True, scenes=scenes, qa={"root": str(questions), "timeout": 5.0})
        begun = draw.random() < 0.5  # the damage happens while the run reads
        how = [spoil_questions(questions, draw)] if draw.random() < 0.5 else []
        streams = [SampleStream(run.data), SampleStream(run.data)] if begun else []
        for _ in range(draw.randint(1, 3)):
            folder, pattern = draw.choice(
                [(library, "*.*"), (library, "color/*"), (questions, "*.mp4"), (tracks, "*.s*")]
            )
            how.append(damage_file(folder, pattern, draw))
        try:
            streams = streams or [SampleStream(run.data), SampleStream(run.data)]
            outcomes = [drawn(run, stream, backbone, micro) for stream, micro in zip(streams, (1, 4), strict=True)]
            replaced += len(outcomes[0][1])
            if outcomes[0][1] != outcomes[1][1] or (family == "qwen2_5_vl" and outcomes[0][0] != outcomes[1][0]):
                failures.append(f"{number} {how}: other samples in other micro-batches")
        except (OSError, ValueError) as error:  # all of it is unusable, or annotations are incomplete
            refused += 1
            if "\n" in str(error) or str(tmp_path) not in str(error):
                failures.append(f"{number} {how}: {str(error)[:300]}")
        except Exception as error:
            failures.append(f"{number} {how}: {type(error).__name__}: {str(error)[:300]}")
    with capsys.disabled():
        print(f" {family}: {TRIES} tries, {len(failures)} failures, {replaced} replaced, {refused} refused")
    assert not failures, "\n".join(failures)
    assert replaced > TRIES and refused < 0.2 * TRIES

"""The evaluation of geometry: planted predictions have known numbers; the commands, from a trained run to a page."""

import json
import math
import re
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gasp_fast import cli
from gasp_fast.backbones.tiny import TinyConfig, build_tiny
from gasp_fast.g2vlm import evaluate as evaluation
from gasp_fast.g2vlm.checkpoint import load_model, save_model
from gasp_fast.g2vlm.collator import GeometryCollator
from gasp_fast.g2vlm.evaluate import GeometryEvaluationConfig, GeometrySequences, evaluate_geometry
from gasp_fast.g2vlm.model import Output
from gasp_fast.g2vlm.report import draw_sequences, report_content
from gasp_fast.g2vlm.saved import SavedGeometryModel, load_geometry_model
from gasp_fast.g2vlm.tiny import build_tiny_encoder

SMALL = ["--frames", "3", "--stride", "2", "--side", "28", "--points", "300", "--sequences", "2"]


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory) -> Path:
    """A run of two steps, from the command line."""
    root = tmp_path_factory.mktemp("g2vlm")
    sizes = TinyConfig(model_type="qwen2_vl", patch_size=14, layers=2, hidden_size=64, query_heads=2)
    qwen, encoder = build_tiny(root / "qwen", sizes), build_tiny_encoder(root / "dino", width=32, layers=1, heads=2)
    (root / "recipe.yaml").write_text(
        f"objective: g2vlm\nmodel: {{source: {qwen}, encoder: {encoder}}}\n"
        "experts: {checkpointing: 'off'}\n"
        "heads: {hidden: 64, width: 32, layers: 1, heads: 2, point_width: 32, camera_width: 16}\n"
        "train: {steps: 2, batch_size: 2, learning_rate: 1e-2}\n"
        f"data: {{roots: [{assets.scenes}], side: 28, max_frames: 3, workers: 0}}\n"
        f"run: {{out: {root / 'run'}, progress: false}}\n"
    )
    assert cli.main(["train", str(root / "recipe.yaml")]) == 0
    return root / "run"


class Planted(nn.Module):
    """Predicts the truth in another unit."""

    def __init__(self, sequences: GeometrySequences, unit: float) -> None:
        super().__init__()
        self.register_buffer("marks", torch.zeros(2))
        self.unit = torch.tensor([unit])
        self.packs = [GeometryCollator()([sequences.sample(number)]) for number in range(len(sequences))]

    def forward(self, images):
        pack = next(pack for pack in self.packs if torch.equal(pack.images, images))
        return Output(pack.true.known(pack.valid).scaled(self.unit), None)


def planted(sequences: GeometrySequences, unit: float) -> SavedGeometryModel:
    return SavedGeometryModel(Planted(sequences, unit), "planted", Path(), "0", None, None)


@pytest.fixture
def sequences(assets):
    return GeometrySequences(
        assets.scenes, GeometryEvaluationConfig(sequences=4, frames=3, stride=2, side=28, points=300)
    )


def read_points(path: Path) -> np.ndarray:
    body = path.read_bytes().split(b"end_header\n", 1)[1]
    return np.frombuffer(body, np.uint8).reshape(-1, 15)[:, :12].copy().view("<f4")


def test_the_truth_in_another_unit_is_perfect_and_its_unit_is_undone(sequences, tmp_path):
    saved = planted(sequences, 0.37)
    found = evaluate_geometry(saved, sequences, tmp_path)
    report = report_content(saved, sequences, found)
    assert report["sequences"] == 4 and len(report["scenes"]) == 4 and not found.left_out
    for numbers in (one["model"] for one in report["by_sequence"]):
        assert (numbers["delta"], numbers["rra"], numbers["rta"], numbers["auc"]) == (1, 1, 1, 1)
        assert numbers["scale"] == pytest.approx(1 / 0.37, rel=1e-5)
        distances = [numbers[name] for name in numbers if name.startswith(("acc", "comp"))]
        assert len(distances) == 4 and max(numbers["abs_rel"], *distances) < 1e-5
    (drawn,) = draw_sequences(saved, sequences, found, 1, tmp_path)
    assert drawn.number == 0
    true, valid = saved.model.packs[0].true.world[0], saved.model.packs[0].valid[0]
    predicted = read_points(tmp_path / "sequence-00000.ply").reshape(true.shape)
    np.testing.assert_allclose(predicted[valid], true[valid], atol=1e-4)
    np.testing.assert_allclose(read_points(tmp_path / "sequence-00000-true.ply"), true[valid])


def test_baselines_equal_a_search_by_hand(sequences, tmp_path):
    saved = planted(sequences, 1.0)
    found = evaluate_geometry(saved, sequences, tmp_path)
    shares = []
    for number, pack in enumerate(saved.model.packs):
        baseline = found.outcomes[number].baseline
        depth = pack.true.local[0, ..., 2][pack.valid[0]].double()
        errors = [float(((constant - depth).abs() / depth).mean()) for constant in depth]  # the best is one of them
        best = depth[int(np.argmin(errors))]
        assert baseline["abs_rel"] == pytest.approx(min(errors), rel=1e-6)
        ratio = torch.maximum(best / depth, depth / best)
        assert baseline["delta"] == pytest.approx(float((ratio < 1.25).double().mean()), abs=1e-9)
        turns = [
            math.degrees(math.acos(min(1.0, (float((a.T @ b).trace()) - 1) / 2)))
            for a, b in combinations(pack.true.rotation[0].double(), 2)
        ]
        assert baseline["rra"] == pytest.approx(np.mean(np.array(turns) < 30))
        shares.append(baseline["rra"])
    mean = report_content(saved, sequences, found)["metrics"]["baseline"]["rra"]
    assert mean == pytest.approx({"mean": np.mean(shares), "median": np.median(shares)})


def test_a_single_frame_has_depth_and_points(assets, tmp_path):
    single = GeometrySequences(assets.scenes, GeometryEvaluationConfig(sequences=1, frames=1, side=28, points=100))
    saved = planted(single, 2.0)
    found = evaluate_geometry(saved, single, tmp_path)
    metrics = report_content(saved, single, found)["metrics"]
    assert metrics["model"]["abs_rel"]["mean"] < 1e-5 and "auc" not in metrics["model"]
    assert len(draw_sequences(saved, single, found, 3, tmp_path)) == 1


def finite(text: str) -> dict:
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_a_run_is_evaluated_from_the_command_line_and_resumed(run, assets, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    out, computed, outcome_of = tmp_path / "report", [], evaluation.outcome_of
    monkeypatch.setattr(evaluation, "outcome_of", lambda *parts: computed.append(1) or outcome_of(*parts))
    line = ["geometry", "--model", str(run), "--scenes", str(assets.scenes), "--out", str(out), *SMALL]
    assert cli.main([*line, "--pictures", "1"]) == 0
    printed = capsys.readouterr().out
    assert "2 sequences of 3 frames, 2 apart, from 2 scenes; frames of 28 × 28 pixels." in printed
    words = " ".join(printed.split())
    for heading in ("AbsRel ↓", "δ 1.25 ↑", "Acc ↓", "Comp ↓", "RRA@30 ↑", "RTA@30 ↑", "AUC@30 ↑"):
        assert words.count(heading) == 2  # in the table and in its legend
    names = {"index.html", "report.json", "sequences.jsonl"}
    names |= {f"sequence-00000{end}" for end in (".ply", "-true.ply", "-depth.png", "-cameras.png")}
    assert {path.name for path in out.iterdir()} == names
    first = finite((out / "report.json").read_text())
    assert first["model"] == "run" and len(computed) == first["sequences"] == 2
    page = (out / "index.html").read_text()
    assert 'id="cloud-data"' in page and "<svg" in page and "data:image/jpeg" in page
    local = {"report.json", "sequence-00000.ply", "sequence-00000-true.ply"}
    assert set(re.findall(r'(?:src|href)="((?!data:|#)[^"]*)"', page)) == local

    stored = (out / "sequences.jsonl").read_text().splitlines(keepends=True)
    (out / "sequences.jsonl").write_text("".join(stored[:2]) + stored[2][:40])  # killed while it wrote
    assert cli.main([*line, "--pictures", "0"]) == 0
    assert len(computed) == 3 and finite((out / "report.json").read_text()) == first
    assert {path.name for path in out.iterdir()} == {"index.html", "report.json", "sequences.jsonl"}

    capsys.readouterr()
    assert cli.main([*line, "--reach", "0.2"]) == 1
    assert re.fullmatch(
        r"gasp-fast geometry: .* other settings \(reach: 0.1 there, 0.2 now\); .* --fresh .*\n", err(capsys)
    )
    assert cli.main([*line, "--reach", "0.2", "--fresh", "--pictures", "0"]) == 0 and len(computed) == 5


def err(capsys) -> str:
    return capsys.readouterr().err


def test_what_cannot_be_read_is_named_and_left_out(sequences, assets, tmp_path):
    scenes = shutil.copytree(assets.scenes, tmp_path / "scenes")
    min((scenes / "scene-1" / "depth").iterdir()).write_bytes(b"no image")
    (scenes / "scene-2" / "intrinsics.txt").write_text("no camera")
    broken = GeometrySequences(scenes, sequences.config)
    saved = planted(sequences, 1.0)
    found = evaluate_geometry(saved, broken, tmp_path / "out")
    report = report_content(saved, broken, found)
    assert report["scenes"] == ["scene-0", "scene-3"]
    (sequence,) = report["left_out"]["sequences"]
    assert sequence["scene"] == "scene-1" and "cannot read" in sequence["reason"]
    (scene,) = report["left_out"]["scenes"]
    assert scene["scene"].endswith("scene-2") and "intrinsics" in scene["reason"]


def test_a_saved_folder_gives_what_its_checkpoint_does(run, tmp_path):
    saved = load_geometry_model(run)
    assert saved.name == "run" and saved.side == 28 and saved.folder.name == "checkpoint-2"
    assert load_geometry_model(run / "checkpoint-2").fingerprint == saved.fingerprint
    assert not saved.model.training and not any(each.requires_grad for each in saved.model.parameters())
    save_model(saved.model, tmp_path / "saved")
    images = torch.randn(1, 2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    expected = saved.model(images).geometry
    again = load_geometry_model(tmp_path / "saved")
    assert torch.equal(again.model(images).geometry.local, expected.local) and again.source is None
    assert not torch.equal(expected.local[0, 0], expected.local[0, 1])  # trained: the map is zero at first


def test_a_checkpoint_of_text_alone_has_the_geometry_of_the_stage_before(run, questions, tmp_path):
    line = ["train", str(run.parent / "recipe.yaml"), f"model.start={run / 'checkpoint-2'}", "train.mode=semantic"]
    line += ["loss.geometry_weight=0", "loss.text_weight=1", f"data.questions={questions}", "train.steps=2"]
    assert cli.main([*line, f"run.out={tmp_path / 'joint'}"]) == 0
    before, after = (load_geometry_model(path).model.state_dict() for path in (run, tmp_path / "joint"))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any(".semantic.qkv." in name for name in changed)
    assert not any(".geometric." in name or name.startswith(("heads.", "patch_map.")) for name in changed)


def test_what_is_no_model_ends_in_one_line(run, assets, tmp_path, capsys):
    def refused(model, *more):
        line = ["geometry", "--model", str(model), "--scenes", str(assets.scenes), "--out", str(tmp_path / "o"), *SMALL]
        assert cli.main([*line, *more]) == 1
        (printed,) = err(capsys).splitlines()
        return printed

    assert "holds no checkpoint" in refused(tmp_path)
    assert "is no folder" in refused(tmp_path / "missing")
    copy = shutil.copytree(run, tmp_path / "run")
    weights = copy / "checkpoint-2" / "model-00001-of-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "is damaged" in refused(copy)
    (run.parent / "dino").rename(run.parent / "moved")
    assert re.search("the base model '.*dino' of the run .* --encoder", refused(run))
    (run.parent / "moved").rename(run.parent / "dino")
    model = load_geometry_model(run).model
    save_model(model, tmp_path / "saved")
    (tmp_path / "saved" / "geometry_config.json").write_text("{}")
    assert "geometry_config.json is damaged" in refused(tmp_path / "saved")
    (tmp_path / "saved" / "geometry_config.json").unlink()
    assert "without a geometry_config.json its heads must have the authors' sizes" in refused(tmp_path / "saved")
    with torch.no_grad():
        model.patch_map.bias.fill_(math.nan)
    save_model(model, tmp_path / "saved")
    assert load_model(tmp_path / "saved").patch_map.bias.isnan().all()
    assert "predicts NaN or infinite geometry" in refused(tmp_path / "saved")


def test_photographs_are_reconstructed(run, assets, tmp_path, capsys):
    photographs = []
    for number, orientation in enumerate((1, 6, 1)):  # 6: shown turned by a quarter
        path = tmp_path / f"photograph-{number}.jpg"
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.open(sorted((assets.scenes / "scene-0" / "color").iterdir())[number]).save(path, exif=exif)
        photographs.append(str(path))
    out = tmp_path / "out"
    line = ["reconstruct", "--model", str(run), "--out", str(out)]
    assert cli.main([*line, *photographs]) == 0
    assert {path.name for path in out.iterdir()} == {"cloud.ply", "cameras.json", "depth-000.png", "index.html"}
    cameras = finite((out / "cameras.json").read_text())
    assert [one["image"] for one in cameras["images"]] == photographs
    assert [one["crop"]["photograph"] for one in cameras["images"]] == [[96, 80], [80, 96], [96, 80]]
    assert cameras["images"][0]["translation"] == [0, 0, 0]
    np.testing.assert_allclose(cameras["images"][0]["rotation"], np.eye(3), atol=1e-6)
    assert len(read_points(out / "cloud.ply")) == 3 * cameras["height"] * cameras["width"]
    assert set(re.findall(r'(?:src|href)="((?!data:)[^"]*)"', (out / "index.html").read_text())) == {
        "cloud.ply",
        "cameras.json",
    }
    assert cli.main([*line, *photographs]) == 1 and "is not empty" in err(capsys)
    assert cli.main([*line[:3], "--out", str(tmp_path / "one"), photographs[0], "--side", "14"]) == 0
    (tmp_path / "text.jpg").write_text("no image")
    assert cli.main([*line[:3], "--out", str(tmp_path / "two"), str(tmp_path / "text.jpg")]) == 1
    assert "text.jpg: cannot read the image" in err(capsys) and not (tmp_path / "two").exists()

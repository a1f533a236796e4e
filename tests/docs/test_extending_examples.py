"""The examples of docs/extending.md and docs/evaluating.md run and do what the documents say."""

import importlib
import json
import math
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from gasp_fast import build_tracks, open_scene
from gasp_fast.backbones import base
from gasp_fast.data.scenes import formats
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples_importable(monkeypatch, tmp_path):
    """The examples' folder is importable, as for a script. What an example registers is removed after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(formats, "FORMATS", formats.FORMATS)
    base.supported_models()  # imports all shipped backbones before the registry is copied
    monkeypatch.setattr(base, "BACKBONES", dict(base.BACKBONES))


@pytest.fixture
def output_of(monkeypatch, capsys):
    """The output of `python examples/NAME.py ARGUMENTS`."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_third_backbone_encodes_frames_and_is_supervised(output_of):
    printed = output_of("custom_backbone")
    assert "Llava: 4 decoder layers, 128 wide" in printed
    assert f"{3 * 14 * 14} visual tokens in 3 frames" in printed
    assert int(re.search(r"(\d+) matches", printed)[1]) > 100
    assert 0 < float(re.search(r"W_Q: (\S+)", printed)[1]) < math.inf


def test_a_custom_scene_format_is_opened_and_tracked(output_of):
    printed = output_of("custom_scene_format")
    assert "recorder: 8 frames" in printed and int(re.search(r"frame 7 sees (\d+)", printed)[1]) > 5


def test_a_custom_scene_format_gives_the_tracks_of_the_scene_it_was_written_from(tmp_path, monkeypatch):
    known = formats.FORMATS
    example = importlib.import_module("custom_scene_format")
    [rendered] = render_scenes(tmp_path / "rendered", 1, config=SyntheticConfig(frames=6, width=96, height=96))
    example.write(open_scene(rendered), tmp_path / "recorded")
    monkeypatch.setattr(formats, "FORMATS", (example, *known))
    ours, theirs = (build_tracks(open_scene(tmp_path / name), [0, 2, 5], 8) for name in ("recorded", rendered))
    assert len(ours) > 5 and np.array_equal(ours.visible, theirs.visible)
    np.testing.assert_allclose(ours.uv, theirs.uv, atol=1e-6)

    monkeypatch.setattr(formats, "FORMATS", known)
    with pytest.raises(ValueError, match="no scene of a known format"):
        open_scene(tmp_path / "recorded")


def test_the_custom_scene_format_takes_no_more_than_a_page():
    assert len((EXAMPLES / "custom_scene_format.py").read_text().splitlines()) <= 80


def test_a_report_is_made_read_and_plotted(output_of, tmp_path):
    printed = output_of("read_report", "--out", "plots")
    best, gain = re.search(r"PCK@2 ([\d.]+)", printed)[1], re.search(r"guess \(([\d.]+)\): ([-+][\d.]+)", printed)
    assert float(gain[2]) == pytest.approx(float(best) - float(gain[1]), abs=2e-3)
    assert (tmp_path / "plots" / "pck_by_gap.png").read_bytes().startswith(b"\x89PNG")


def test_an_existing_report_is_read_from_its_folder(output_of, tmp_path):
    """With undefined values: no point moved, and gaps without any query point."""
    pck = {"per_layer": [0.25, 0.75], "peak": 0.75, "peak_layer": 4}
    temporal = {"layer": 4, "gaps": [1, 2, 3], "pck": [0.9, None, 0.5], "identity": [0.5, None, 0.1]}
    report = {"model": "m", "sequences": 3, "features": "qk", "layers": [2, 4], "pck": pck, "identity": 0.5}
    report |= {"pck_moved": {"per_layer": [0.1, None]}, "temporal": temporal, "by_features": {"qk": {"pck": pck}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    printed = output_of("read_report", str(tmp_path), "--out", str(tmp_path))
    assert "best layer 4 of 4: PCK@2 0.750, no point moved" in printed
    assert "(0.500): +0.250" in printed

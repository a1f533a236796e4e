"""The picture shows the tracks of a scene."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from support.commands import run
from support.scene_formats import mistaken

from gasp_fast.cli import scenes as command
from gasp_fast.data.inspection.picture import draw_tracks


def test_the_picture_shows_the_tracks(scene_boxes, tmp_path):
    picture = np.asarray(Image.open(draw_tracks(scene_boxes, tmp_path / "p.png")).convert("RGB"))
    assert picture.shape[1] > 1500 and picture.std() > 30
    colourful = np.ptp(picture.astype(int), axis=2) > 120
    assert colourful.mean() > 0.02


def test_a_scene_without_any_visible_track_still_gives_a_picture(scene_boxes, tmp_path):
    away = mistaken(scene_boxes, pose=lambda p: np.diag([-1.0, 1.0, -1.0, 1.0]) @ p if p[0, 3] else p)
    assert draw_tracks(away, tmp_path / "p.png").stat().st_size > 10_000


def test_the_picture_goes_to_the_current_folder_or_to_the_given_path(scene_boxes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(command, scene_boxes.root, "--picture", "--first", 2, "--grid", 6) == 0
    assert (tmp_path / "boxes-tracks.png").is_file()
    with pytest.raises(ValueError, match=r"give a \.png file"):
        run(command, scene_boxes.root, "--picture", tmp_path / "named.jpg")
    with pytest.raises(ValueError, match="--first 99"):
        run(command, scene_boxes.root, "--picture", "--first", 99)

"""Clips are either complete or absent, and can be played."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gasp_fast.data.video.read import read_video
from gasp_fast.data.video.write import write_clip


def test_an_empty_clip_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        write_clip(tmp_path / "a.mp4", [])
    with pytest.raises(ValueError):
        write_clip(tmp_path / "a.mp4", [*[np.zeros((32, 32, 3), np.uint8)] * 90, np.zeros((32, 32), np.uint8)])
    assert list(tmp_path.iterdir()) == []


def test_a_clip_with_odd_sides_loses_its_last_row_and_column(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", [np.full((33, 51, 3), 90, np.uint8)] * 2)
    assert read_video(tmp_path / "a.mp4", 2).shape == (2, 32, 50, 3)

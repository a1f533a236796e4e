"""Recorded RGB-D scenes. They are not part of the repository: tests look for them in a folder beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "realdata"


def recorded_scene(name: str) -> Path:
    """The folder of a recorded scene; skips the test where this machine does not have it."""
    if not (FOLDER / name).is_dir():
        pytest.skip(f"the recorded scene {name} is not on this machine")
    return FOLDER / name

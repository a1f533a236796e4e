"""A folder with all inputs of the documents' commands, created once a session."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from docs.prepared import ROOT, prepare


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(root)
        prepare(root)
    return root


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A copy of the prepared folder to work in; docs/data.md begins with raw data and creates the rest itself."""

    def enter(document: str) -> Path:
        folder = tmp_path / "workplace"
        shutil.copytree(prepared, folder, symlinks=True)
        if document == "docs/data.md":
            shutil.rmtree(folder / "data" / "tracks")
            shutil.rmtree(folder / "data" / "dl3dv-vqa")
            shutil.rmtree(folder / "data" / "dl3dv-vqa-llava")
            shutil.rmtree(folder / "data" / "dl3dv")
            (folder / "raw").rename(folder / "data" / "dl3dv")
        monkeypatch.chdir(folder)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.syspath_prepend(ROOT / "examples")
        return folder

    return enter

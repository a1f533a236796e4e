"""A `SceneFolder` gives what the file system gives, from one listing of each folder, and lets no path out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.many_scenes import counted_calls

from gasp_fast.data.scenes.folder import SceneFolder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A scene folder beside files that do not belong to it."""
    root = tmp_path / "scene"
    (root / "images" / "deep").mkdir(parents=True)
    for name in ("images/a.png", "images/b.png", "images/deep/c.png", "meta.json"):
        (root / name).write_bytes(b"x")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "z.png").write_bytes(b"x")
    (root / "photographs").symlink_to("images")
    (root / "images" / "link.png").symlink_to("a.png")
    (root / "images" / "broken.png").symlink_to("nothing.png")
    (root / "images" / "itself.png").symlink_to("itself.png")
    (root / "out.png").symlink_to(tmp_path / "outside" / "z.png")
    (root / "away").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "back").symlink_to(root / "images")
    os.mkfifo(root / "pipe")
    return root


PATHS = [
    "images/a.png", "images/deep/c.png", "images/none.png", "none/a.png", "images", "pipe", "photographs/a.png",
    "images/link.png", "images/broken.png", "images/itself.png", "images/../meta.json", "photographs/deep/c.png",
    "images/a.png/x", "away/back/a.png", ".", "images/deep/../../meta.json",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_it_finds_the_files_that_are_there(root: Path, path: str) -> None:
    files = SceneFolder(root)
    assert files.is_file(root / path) == os.path.isfile(root / path)
    assert files.is_dir(root / path) == os.path.isdir(root / path)
    assert files.inside(root / path) == root / path


@pytest.mark.parametrize(
    "path", ["../outside/z.png", "out.png", "away/z.png", "away", "images/../../outside/z.png", "..", "/etc/hostname"]
)
def test_a_path_out_of_the_scene_is_refused(root: Path, path: str) -> None:
    with pytest.raises(ValueError, match="leads out of the scene folder"):
        SceneFolder(root).inside(root / path)


def test_a_relative_root_and_a_link_to_the_root_are_the_same_scene(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(root)
    for start in (tmp_path / "link", Path("."), Path("../scene")):
        files = SceneFolder(start)
        assert files.is_file(files.inside(start / "images" / "a.png"))
        assert files.names(start / "photographs") == sorted(os.listdir(root / "images"))
        with pytest.raises(ValueError, match="leads out"):
            files.inside(start / "out.png")


def test_names_of_a_folder_that_leads_out_are_refused_and_those_of_none_are_empty(root: Path) -> None:
    assert SceneFolder(root).names(root / "none") == []
    with pytest.raises(ValueError, match="leads out"):
        SceneFolder(root).names(root / "away")


@pytest.mark.parametrize("path", ["a/" * 3000 + "b", "x" * 300, "a\0b", "\ud800/a", "d/" * 40 + "b"])
def test_a_path_that_cannot_be_is_missing_or_one_error(root: Path, path: str) -> None:
    files = SceneFolder(root)
    try:
        assert not files.is_file(files.inside(root / path))
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)


def test_a_thousand_files_take_as_many_calls_as_one(root: Path) -> None:
    for number in range(1000):
        (root / "images" / "deep" / f"{number}.png").touch()
    counts = []
    for number in (1, 1000):
        files = SceneFolder(root)
        with counted_calls() as calls:
            for path in [root / "images" / "deep" / f"{n}.png" for n in range(number)]:
                assert files.is_file(files.inside(path))
        counts.append(calls.count)
    assert counts[0] == counts[1] <= 3

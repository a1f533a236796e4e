"""A file never holds part of its new content, whatever happens to the process that writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gasp_fast.files import complete_folder, replacing, sweep_partials, write_atomically


def test_content_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    for content in (b"old", b"new content"):
        write_atomically(tmp_path / "a.json", content)
        assert (tmp_path / "a.json").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.json", b"old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.json") as partial:
        partial.write_bytes(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "a.json").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_killed_processes_left_of_a_file_is_swept_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.json.12.partial", ".a.json.7.partial", ".b.json.12.partial", "a.json"):
        (tmp_path / name).touch()
    sweep_partials(tmp_path / "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.json.12.partial", "a.json"]


def test_a_folder_is_complete_or_absent_and_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".model.12.partial").mkdir()
    with pytest.raises(KeyboardInterrupt), complete_folder(tmp_path / "model") as partial:
        (partial / "weights").write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with complete_folder(tmp_path / "new" / "model") as partial:
        (partial / "weights").write_bytes(b"all")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == [Path("new/model/weights")]

"""A file never holds part of its new content, and JSON of any kind is read or refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gasp_fast.files import complete_folder, read_json, replacing, sweep_partials, write_atomically


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


FULL = """
import resource, sys
from pathlib import Path
from gasp_fast import files
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
path, how = Path(sys.argv[1]), sys.argv[2]
try:
    for _ in range(3):
        files.append(path, "x" * 500) if how == "append" else files.write_atomically(path, b"x" * 1500)
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("how", ["append", "replace"])
def test_that_nothing_more_can_be_written_is_said_with_the_name_of_the_file(tmp_path: Path, how: str) -> None:
    """Python names no file where a disk is full."""
    path = tmp_path / "log.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL, path, how], text=True, capture_output=True, check=True)
    assert done.stdout == f"{path} cannot be written: File too large\n"
    assert path.exists() == (how == "append") and not list(tmp_path.glob(".*"))


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


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a":' * 5000, "1" + "0" * 5000, "\xff", "NaN,"])
def test_json_that_cannot_be_parsed_is_one_line_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"a\.json: not JSON") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_json_is_utf_8_whatever_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    (tmp_path / "a.json").write_bytes('{"ä": "–"}'.encode())
    assert read_json(tmp_path / "a.json") == {"ä": "–"}


def test_pipes_folders_and_large_files_are_not_read_as_json(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json"):
        with pytest.raises(OSError, match=f"{name}: not a regular file"):
            read_json(tmp_path / name)
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"a\.json: 6 bytes of JSON; at most 5 are read"):
        read_json(tmp_path / "a.json", largest=5)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")

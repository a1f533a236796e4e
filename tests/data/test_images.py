"""Which image files are opened, and in which words the others are refused."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gasp_fast.data.images import FORMATS, LARGEST_RATIO, MOST_PIXELS
from gasp_fast.data.scenes.depth_maps import read_depth
from gasp_fast.data.scenes.scene import image_size

EPS = """%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 40 30
%%EndComments
(OWNED) = showpage
%%EOF
"""


def png(path: Path, width: int, height: int, depth: bool = False) -> Path:
    """A PNG of a few bytes whose header claims `width` x `height`."""
    header = struct.pack(">IIBBBBB", width, height, 16 if depth else 8, 0 if depth else 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_the_named_formats_are_read_whatever_the_suffix(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (40, 30), (10, 200, 30)).save(tmp_path / "a.jpg", name)
    assert image_size(tmp_path / "a.jpg") == (40, 30)


def test_the_two_pictures_of_a_phone_in_one_jpeg_are_read_as_the_first(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (40, 30), grey) for grey in ("black", "white"))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert image_size(tmp_path / "a.jpg") == (40, 30)


@pytest.mark.parametrize("name", ["EPS", "GIF", "PPM", "TGA", "ICNS", "PCX"])
def test_a_file_of_another_format_runs_no_decoder(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "EPS":
        (tmp_path / "a.jpg").write_text(EPS)
    else:
        Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg", name)
    Image.init()
    monkeypatch.setitem(Image.OPEN, name, (lambda *_: pytest.fail(f"the decoder of {name} ran"), None))
    with pytest.raises(OSError, match=r"a\.jpg: cannot read image: cannot identify image file"):
        image_size(tmp_path / "a.jpg")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [11_000, 6_000, 20_000, 1 << 30])
@pytest.mark.parametrize("depth", [False, True])
def test_a_frame_of_too_many_pixels_is_refused_with_size_limit_and_cure(tmp_path: Path, side: int, depth: bool) -> None:
    path = png(tmp_path / "a.png", side, side, depth)
    with pytest.raises(OSError) as caught:
        (read_depth if depth else image_size)(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: cannot read {'depth' if depth else 'image'}: ") and "\n" not in text
    assert f"at most {MOST_PIXELS:,} pixels are read; shrink it" in text
    assert f"{side} x {side}" in text or str(side * side) in text


def test_depth_arrays_of_too_many_pixels_are_refused_before_they_are_read(tmp_path: Path) -> None:
    stored = np.lib.format.open_memmap(tmp_path / "d.npy", "w+", np.float32, (1 << 16, 1 << 14))  # a sparse file
    del stored
    with pytest.raises(OSError, match=r"d\.npy: cannot read depth: size 16384 x 65536: at most"):
        read_depth(tmp_path / "d.npy")


def test_the_largest_frame_is_read(tmp_path: Path) -> None:
    assert MOST_PIXELS >= 7680 * 4320
    assert image_size(png(tmp_path / "a.png", 7680, 4320)) == (7680, 4320)


def test_a_strip_that_no_model_takes_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (10 * LARGEST_RATIO, 10)).save(tmp_path / "strip.png")
    assert image_size(tmp_path / "strip.png") == (2000, 10)
    Image.new("RGB", (10, 10 * LARGEST_RATIO + 1)).save(tmp_path / "strip.png")
    with pytest.raises(OSError, match=r"strip\.png: .* size 10 x 2001: one side is over 200 times the other; crop it"):
        image_size(tmp_path / "strip.png")


@pytest.mark.parametrize("suffix", [".png", ".npy", ".exr", ".bin"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "nothing"])
def test_only_regular_files_are_read(tmp_path: Path, suffix: str, kind: str) -> None:
    """Opening a pipe without a writer would never return."""
    path = tmp_path / f"a{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    for read in (image_size, read_depth):
        with pytest.raises(OSError, match=r"cannot read (image|depth): missing, or not a regular file") as caught:
            read(path)
        assert str(path) in str(caught.value)

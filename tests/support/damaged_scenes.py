"""Damages copies of a scene folder at random and uses them: `python damaged_scenes.py SCENE WORK TRIES`.

Prints each try before it begins, then one JSON object: `tries`, how many were `fine` or `refused`, and the `failures`
(anything but one line that names the folder). A program of its own: a decoder that crashes or hangs ends it, not the
tests.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gasp_fast.data.depth.compute import depth_from_mvs, has_mvs
from gasp_fast.data.inspection.consistency import check_scene
from gasp_fast.data.scenes.frame_cache import DECODED
from gasp_fast.data.scenes.library import find_scenes, scene_digest
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.tracks.build import build_tracks

ODD_VALUES: list[Any] = [
    None, True, -1, 0, 10**11, 10**400, 1e308, float("nan"), float("inf"), "", "\0", "\ud800", "../x", "é" * 5000,
    [], {}, [[]] * 20_000, {"a": {}},
]  # fmt: skip
ODD_TEXTS = [b"nan", b"1e999", b"-1", b"99999999999", b"null", b"[[[", b'"', b"&&", b"[" * 50_000, b"9" * 5000]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n%%EOF\n"


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 121 million pixels."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 11_000, 11_000, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def with_odd_value(value: Any, draw: random.Random) -> Any:
    """The JSON value with one part of it replaced."""
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        value[key] = with_odd_value(value[key], draw)
        return value
    odd = draw.choice([*ODD_VALUES, "deep"])
    if odd == "deep":
        for _ in range(900):
            odd = [odd]
    return odd


def damage_bytes(path: Path, draw: random.Random) -> str:
    data = bytearray(path.read_bytes())
    kind = draw.choice(["cut", "flip", "head", "noise", "empty", "grow", "text", "eps", "bomb"])
    if kind == "cut":
        del data[draw.randrange(len(data)) :]
    elif kind in ("flip", "head"):
        for _ in range(draw.randrange(1, 9)):
            data[draw.randrange(min(len(data), 96) if kind == "head" else len(data))] = draw.randrange(256)
    elif kind == "noise":
        data = bytearray(draw.randbytes(len(data)))
    elif kind == "empty":
        data.clear()
    elif kind == "grow":
        data += draw.randbytes(100)
    elif kind == "text":
        at = draw.randrange(len(data))
        data[at : at + 3] = draw.choice(ODD_TEXTS)
    else:
        data = bytearray(EPS if kind == "eps" else bomb())
    path.write_bytes(data)
    return kind


def damage_json(path: Path, draw: random.Random) -> str:
    path.write_text(json.dumps(with_odd_value(json.loads(path.read_text()), draw)))
    return "odd value"


def damage_camera(path: Path, draw: random.Random) -> str:
    """Another size of the first camera of a binary COLMAP model, such as 0 x 0."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<QQ", data, 16, *(draw.choice([0, 1, 10**11, 2**64 - 1]) for _ in range(2)))
    path.write_bytes(data)
    return "camera size"


def replace_file(path: Path, draw: random.Random) -> str:
    path.unlink()
    kind = draw.choice(["pipe", "folder", "device", "gone", "link to itself"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    return kind


def use(folder: Path) -> None:
    """All that commands and training do with a scene."""
    find_scenes(folder.parent)
    scene = open_scene(folder)
    scene_digest(scene)
    check_scene(scene)
    if scene.has_depth:
        build_tracks(scene, range(len(scene)), grid=6)
    for i in range(len(scene)):
        scene.image(i)
    if has_mvs(scene):
        depth_from_mvs(scene)
        open_scene(folder)


def main(source: Path, work: Path, tries: int) -> dict[str, Any]:
    draw = random.Random(source.name)
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    outcomes: dict[str, Any] = {"tries": tries, "fine": 0, "refused": 0, "failures": []}
    DECODED.resize(0)
    for number in range(tries):
        # Every kind of file is damaged equally often, however few there are of it.
        kind = draw.choice(sorted({path.suffix + path.parts[0] for path in files}))
        name = draw.choice([path for path in files if path.suffix + path.parts[0] == kind])
        ways: list[Callable[[Path, random.Random], str]] = [damage_bytes, damage_bytes, replace_file]
        ways += [damage_json] * 6 if name.suffix == ".json" else []
        ways += [damage_camera] * 3 if name.name == "cameras.bin" else []
        shutil.rmtree(work, ignore_errors=True)
        folder = work / "scene"
        shutil.copytree(source, folder)
        how = draw.choice(ways)(folder / name, draw)
        print(f"{number} {name}: {how}", flush=True)
        try:
            use(folder)
            outcomes["fine"] += 1
        except (ValueError, OSError) as error:
            text = str(error)
            if "\n" in text or str(work) not in text or len(text) > 1000:
                outcomes["failures"].append(f"{number} {name}: {how}: {type(error).__name__}: {text[:500]}")
            outcomes["refused"] += 1
        except Exception:
            outcomes["failures"].append(f"{number} {name}: {how}: {traceback.format_exc()[-1500:]}")
    return outcomes


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))

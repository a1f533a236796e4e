"""`meta.json` of a scene: what its other files do not say. It may be missing.

`depth_scale`: stored units of depth in one unit of the poses. `depth_invalid`: stored values that mean unknown, beside
0, and beside the largest value of 16 bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gasp_fast.data.errors import shown
from gasp_fast.data.scenes.folder import SceneFolder
from gasp_fast.data.scenes.scene import number_of
from gasp_fast.files import read_json

META = "meta.json"
INVALID = "depth_invalid"
SMALLEST_SCALE = 1e-12  # its inverse is still a number in float32


def read_meta(files: SceneFolder) -> dict[str, Any]:
    """The content of `meta.json`; empty if there is none."""
    path = files.root / META
    if not files.is_file(files.inside(path)):
        return {}
    meta = read_json(path)
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: holds {type(meta).__name__}, not an object")
    return meta


def depth_scale(root: Path, meta: dict[str, Any], default: float) -> float:
    scale = number_of(root / META, meta, "depth_scale", default)
    if scale < SMALLEST_SCALE:
        raise ValueError(f"{root / META}: depth_scale = {scale:g}; it is the number of units per metre, above 0")
    return scale


def depth_invalid(path: Path, values: dict[str, Any]) -> tuple[float, ...]:
    """The stored values of depth that mean unknown, as `values`, the content of the JSON file `path`, names them."""
    stated = values.get(INVALID, [])
    listed = stated if isinstance(stated, list) else [stated]
    try:
        return tuple(number_of(path, {INVALID: value}, INVALID) for value in listed)
    except ValueError as error:
        raise ValueError(f"{path}: {INVALID} = {shown(stated)} is neither a number nor a list of numbers") from error

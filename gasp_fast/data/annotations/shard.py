"""One shard: the tracks of consecutive sequences in a safetensors file.

The sequences lie back to back; three tables of offsets give where the frames, tracks and cells (track x frame) of each
begin. The header holds the version, the digest of the settings (as `plan`), a checksum of all arrays, and the sequences
that failed, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from gasp_fast.data.errors import one_line
from gasp_fast.data.tracks.build import Tracks
from gasp_fast.files import parse_json

from .settings import VERSION

ARRAYS = frozenset(
    ("scene", "frame_offsets", "track_offsets", "cell_offsets", "frames", "query", "uv", "depth", "visible")
)
Arrays = dict[str, NDArray[Any]]
BLOCK = 4 << 20  # bytes of an array that are read at once for the checksum
_KEY = "gasp_fast"  # of the header in the safetensors metadata


class ForeignShardError(ValueError):
    """A shard was made with other settings."""


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"tracks-{number:05d}.safetensors"


def shard_arrays(scenes: Sequence[int], tracks: Sequence[Tracks]) -> Arrays:
    """The arrays of a shard; `scenes[s]` is the scene of sequence `s` in the settings."""

    def offsets(counts: list[int]) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    return {
        "scene": np.array(scenes, np.int32),  # [S]
        "frame_offsets": offsets([len(t.frames) for t in tracks]),  # [S + 1]
        "track_offsets": offsets([len(t) for t in tracks]),
        "cell_offsets": offsets([t.visible.size for t in tracks]),
        "frames": np.concatenate([t.frames for t in tracks]).astype(np.int32),
        "query": np.concatenate([t.query for t in tracks]).astype(np.float32),  # [tracks, 2]
        "uv": np.concatenate([t.uv.reshape(-1, 2) for t in tracks]).astype(np.float32),  # [cells, 2]
        "depth": np.concatenate([t.depth.ravel() for t in tracks]).astype(np.float32),
        "visible": np.concatenate([t.visible.ravel() for t in tracks]).astype(np.uint8),
    }


def shard_bytes(arrays: Arrays, settings_digest: str, failed: dict[str, str]) -> bytes:
    """The content of a shard file."""
    header = {"version": VERSION, "plan": settings_digest, "checksum": checksum(arrays), "failed": failed}
    # A single metadata key: safetensors writes several in an order that differs from run to run.
    return save(arrays, {_KEY: json.dumps(header)})


def open_shard(path: Path, settings_digest: str) -> tuple[Any, dict[str, Any]]:
    """The open shard and its header. Reads nothing else, but a file that is too short or too long is an error."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, or not a regular file; finish with gasp-fast tracks")
    try:
        shard = safe_open(path, "numpy")
        header = _header(shard)
    except Exception as error:  # safetensors raises its own exception types on damaged files
        raise OSError(f"{path}: damaged ({one_line(error)}); delete it and run gasp-fast tracks again") from error
    if header["plan"] != settings_digest:
        raise ForeignShardError(f"{path}: was made with other settings; delete it and run gasp-fast tracks again")
    return shard, header


def _header(shard: Any) -> dict[str, Any]:
    header = parse_json((shard.metadata() or {}).get(_KEY, "{}"), "header")
    failed = header.get("failed") if isinstance(header, dict) and {"plan", "checksum"} <= header.keys() else None
    if not isinstance(failed, dict) or not all(
        index.isdecimal() and isinstance(why, str) for index, why in failed.items()
    ):
        raise ValueError("no header of gasp-fast tracks")
    return header


def checksum(arrays: Arrays) -> str:
    """A hash of the names, types, shapes and values of the arrays."""
    digest = blake2b(digest_size=16)
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def is_intact(shard: Any, header: dict[str, Any]) -> bool:
    """Whether an open shard has the arrays that were written. Holds `BLOCK` bytes of them at a time."""
    if set(shard.keys()) != ARRAYS:
        return False
    try:
        return header["checksum"] == _checksum_of(shard)
    except Exception:  # safetensors raises its own exception types
        return False


def _checksum_of(shard: Any) -> str:
    digest = blake2b(digest_size=16)
    for name in sorted(shard.keys()):
        table = shard.get_slice(name)
        shape = tuple(table.get_shape())
        for number, block in enumerate(_blocks(shard, name, shape)):
            if number == 0:
                digest.update(f"{name} {block.dtype.str} {shape}".encode())
            digest.update(np.ascontiguousarray(block).data)
    return digest.hexdigest()


def _blocks(shard: Any, name: str, shape: tuple[int, ...]) -> Iterator[NDArray[Any]]:
    """The rows of an array, some at a time; one empty block if there are none."""
    if 0 in shape or not shape:
        yield shard.get_tensor(name)
        return
    table = shard.get_slice(name)
    step = max(1, BLOCK // table[0:1].nbytes)
    for start in range(0, shape[0], step):
        yield table[start : min(start + step, shape[0])]

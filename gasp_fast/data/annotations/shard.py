"""One shard: the tracks of consecutive sequences in a safetensors file.

The sequences lie back to back; three tables of offsets give where the frames, tracks and cells (track x frame) of each
begin. The header holds the version, the digest of the settings (as `plan`), a checksum of all arrays, and the sequences
that failed, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from gasp_fast.data.tracks.build import Tracks
from gasp_fast.files import parse_json

from .settings import VERSION

ARRAYS = frozenset(
    ("scene", "frame_offsets", "track_offsets", "cell_offsets", "frames", "query", "uv", "depth", "visible")
)
Arrays = dict[str, NDArray[Any]]
_KEY = "gasp_fast"  # of the header in the safetensors metadata


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


def read_header(shard: Any) -> dict[str, Any]:
    """The header of an open shard; a `ValueError` if it has none."""
    header = parse_json((shard.metadata() or {}).get(_KEY, "{}"), "header")
    if not (
        isinstance(header, dict) and {"plan", "checksum"} <= header.keys() and isinstance(header.get("failed"), dict)
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

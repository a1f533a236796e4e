"""Tracks computed once, kept on disk: sharded, memory-mapped, versioned, checksummed.

A cache is a folder with `plan.json` and shards `tracks-00000.safetensors`, …. The plan (scenes, sampler, grid) says
everything that goes into every shard, and a shard is a pure function of the plan and the scenes. Hence the promises:

- Shards are made in any order, by any number of processes or machines, and are the same to the last byte.
- A shard is written under a temporary name and renamed: killed work leaves whole shards only, and is taken up again
  where it was.
- A shard is opened when one of its sequences is read, and only the bytes of that sequence are touched. Memory does not
  grow with the length of the cache, and a sequence costs no memory at all until it is read.

In a shard the sequences lie back to back; three tables of offsets say where each one's frames, tracks and cells
(track x frame) begin. The shard's header holds its version, the plan's digest, a checksum of all its arrays, and the
sequences that failed, with the reason.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from gasp_fast.data.annotations.shards import numbers_of_part
from gasp_fast.data.scenes.library import SceneEntry, digest_of
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.scenes.scene import Scene
from gasp_fast.data.tracks.build import Tracks, build_tracks
from gasp_fast.data.tracks.sequences import SequenceConfig, SequenceSampler
from gasp_fast.files import sweep_partials, write_atomically
from gasp_fast.processes import in_processes

VERSION = 1
PLAN_FILE = "plan.json"
OPEN_SHARDS = 16

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class AnnotationPlan:
    """What a cache holds: sequence `i` is sequence `i % n` of epoch `i // n`, `n` being an epoch's sequences."""

    scenes: tuple[SceneEntry, ...]
    sequences: SequenceConfig = field(default_factory=SequenceConfig)
    grid: int = 8
    keep: float = 0.5
    epochs: int = 1
    shard_size: int = 1024  # sequences

    def __post_init__(self) -> None:
        for name in ("grid", "epochs", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")

    @cached_property
    def sampler(self) -> SequenceSampler:
        return SequenceSampler([s.frames for s in self.scenes], self.sequences, [s.name for s in self.scenes])

    def __len__(self) -> int:
        return len(self.sampler) * self.epochs

    @property
    def shards(self) -> int:
        return -(-len(self) // self.shard_size)

    def of_shard(self, number: int) -> range:
        """The sequences of a shard."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, len(self)))

    @property
    def expected_bytes(self) -> int:
        """An upper estimate of the size on disk: every query tracked, frames at their mean."""
        frames = (self.sequences.min_frames + self.sequences.max_frames) / 2
        tracks = self.grid**2 * self.keep
        return int(len(self) * (tracks * frames * 13 + tracks * 8 + frames * 4 + 28))

    def to_json(self) -> str:
        return json.dumps({"format": "gasp-fast tracks", "version": VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> AnnotationPlan:
        fields = json.loads(text)
        version = fields.pop("version", None)
        if fields.pop("format", None) != "gasp-fast tracks" or version != VERSION:
            raise ValueError(
                f"version {version} of the annotations is not the one read here, {VERSION}; make them anew"
            )
        scenes = tuple(SceneEntry(**entry) for entry in fields.pop("scenes"))
        return cls(scenes=scenes, sequences=SequenceConfig(**fields.pop("sequences")), **fields)

    @cached_property
    def digest(self) -> str:
        return blake2b(self.to_json().encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Annotation:
    """The tracks of one planned sequence; no tracks at all if its scene could not be read."""

    scene: str
    tracks: Tracks


# ---- writing --------------------------------------------------------------------------------------------------------


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"tracks-{number:05d}.safetensors"


def store_plan(folder: Path, plan: AnnotationPlan) -> None:
    """Begins a cache, or joins one that has the very same plan."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN_FILE
    if path.exists():
        difference = _difference(json.loads(path.read_text()), json.loads(plan.to_json()))
        if difference:
            raise ValueError(f"{folder} holds annotations of another plan ({difference}): give another --out")
        return
    write_atomically(path, plan.to_json().encode())


def _difference(old: Any, new: Any, name: str = "plan") -> str:
    """The first place where two JSON values differ, in words; empty if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return next((d for key in old if (d := _difference(old[key], new[key], key))), "")
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{name}: {len(old)} there, {len(new)} now"
        return next((d for a, b in zip(old, new, strict=True) if (d := _difference(a, b, name))), "")
    return "" if old == new else f"{name}: {old} there, {new} now"


def annotate(
    library: Path, folder: Path, plan: AnnotationPlan, workers: int = 1, part: tuple[int, int] = (0, 1)
) -> Iterator[int]:
    """Makes the missing shards of `folder` and yields the number of each shard when it is there.

    `part = (i, n)` does only every n-th shard, so that n machines with one disk share the work.
    """
    numbers = numbers_of_part(plan.shards, part)
    if part == (0, 1):
        sweep_partials(folder / PLAN_FILE)  # with parts, another machine may be writing it at this moment
    store_plan(folder, plan)
    missing = []
    for number in numbers:
        if _is_valid(folder, number, plan):
            yield number
        else:
            missing.append(number)
            sweep_partials(shard_path(folder, number))
    for number, _ in in_processes(partial(write_shard, library, folder, plan), missing, workers):
        yield number


def write_shard(library: Path, folder: Path, plan: AnnotationPlan, number: int) -> None:
    """Computes and writes one shard."""
    arrays, failed = _tracks_of_shard(library, plan, number)
    header = {"version": VERSION, "plan": plan.digest, "checksum": checksum(arrays), "failed": failed}
    # One key only: the order of several would differ from run to run.
    write_atomically(shard_path(folder, number), save(arrays, {"gasp_fast": json.dumps(header)}))


def _tracks_of_shard(library: Path, plan: AnnotationPlan, number: int) -> tuple[Arrays, dict[str, str]]:
    sequences: list[Annotation] = []
    scenes: list[int] = []
    failed: dict[str, str] = {}
    opened: tuple[int, Scene | str] = (-1, "")
    for index in plan.of_shard(number):
        drawn = plan.sampler.draw(*divmod(index, len(plan.sampler)))
        if opened[0] != drawn.scene:
            opened = drawn.scene, _open_planned(library, plan.scenes[drawn.scene])
        entry, scene = plan.scenes[drawn.scene], opened[1]
        try:
            if isinstance(scene, str):
                raise OSError(scene)
            tracks = build_tracks(scene, drawn.frames, grid=plan.grid, keep=plan.keep)
        except (OSError, ValueError) as error:
            reason = str(error).replace(f"{library}{os.sep}", "")  # the bytes must not tell where the library lies
            failed[str(index)] = reason if entry.name in reason else f"{entry.name}: {reason}"
            tracks = _no_tracks(drawn.frames)
        sequences.append(Annotation(entry.name, tracks))
        scenes.append(drawn.scene)
    return _join(scenes, [s.tracks for s in sequences]), failed


def _open_planned(library: Path, entry: SceneEntry) -> Scene | str:
    """The scene, or why it cannot be read; a scene that is not the planned one stops everything."""
    try:
        scene = open_scene(library / entry.name)
    except (OSError, ValueError) as error:
        return str(error)
    if digest_of(scene) != entry.digest:
        raise ValueError(f"{library / entry.name}: the scene has changed since the plan was made; give another --out")
    return scene


def _no_tracks(frames: Sequence[int]) -> Tracks:
    count = len(frames)
    return Tracks(
        frames=np.array(frames, np.int64),
        query=np.empty((0, 2)),
        uv=np.empty((0, count, 2)),
        visible=np.empty((0, count), bool),
        depth=np.empty((0, count)),
    )


def _join(scenes: Sequence[int], tracks: Sequence[Tracks]) -> Arrays:
    """Sequences back to back, with their offsets."""

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


def checksum(arrays: Arrays) -> str:
    digest = blake2b(digest_size=16)
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _is_valid(folder: Path, number: int, plan: AnnotationPlan) -> bool:
    """Whether the shard is there, whole and of this plan. Its checksum is left to `verify`: it means reading it all."""
    try:
        with safe_open(shard_path(folder, number), "numpy") as shard:
            header = _header(shard)
    except Exception:  # safetensors has its own exception types for every kind of damage
        return False
    return header.get("plan") == plan.digest


def _header(shard: Any) -> dict[str, Any]:
    header: dict[str, Any] = json.loads((shard.metadata() or {}).get("gasp_fast", "{}"))
    return header


# ---- reading --------------------------------------------------------------------------------------------------------


class AnnotationCache:
    """The annotations in a folder, by number; pickles into loader workers."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.plan = AnnotationPlan.from_json((self.folder / PLAN_FILE).read_text())
        except FileNotFoundError:
            raise OSError(f"{self.folder}: no annotations here; make them with gasp-fast tracks") from None
        except ValueError as error:
            raise ValueError(f"{self.folder / PLAN_FILE}: {error}") from error
        self._shards: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Annotation:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {self.folder}, which has {len(self)}")
        number, place = divmod(index, self.plan.shard_size)
        shard = self._shard(number)

        def rows(name: str, offsets: str) -> NDArray[Any]:
            start, end = (int(n) for n in shard.get_slice(offsets)[place : place + 2])
            table = shard.get_slice(name)
            if start == end:  # safetensors refuses an empty slice at the end of a tensor
                return np.empty((0, *table.get_shape()[1:]), np.float32)
            found: NDArray[Any] = table[start:end]
            return found

        frames = rows("frames", "frame_offsets")
        shape = (-1, len(frames))
        tracks = Tracks(
            frames=frames.astype(np.int64),
            query=rows("query", "track_offsets"),
            uv=rows("uv", "cell_offsets").reshape(*shape, 2),
            visible=rows("visible", "cell_offsets").astype(bool).reshape(shape),
            depth=rows("depth", "cell_offsets").reshape(shape),
        )
        return Annotation(self.plan.scenes[int(shard.get_slice("scene")[place : place + 1][0])].name, tracks)

    def _shard(self, number: int) -> Any:
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        path = shard_path(self.folder, number)
        if not path.exists():
            raise OSError(f"{path}: shard {number} of {self.plan.shards} is missing; finish with gasp-fast tracks")
        try:
            shard = safe_open(path, "numpy")
        except Exception as error:
            raise OSError(f"{path}: damaged ({error}); delete it and run gasp-fast tracks again") from error
        if _header(shard).get("plan") != self.plan.digest:
            raise ValueError(f"{path}: belongs to another plan; delete it and run gasp-fast tracks again")
        self._shards[number] = shard
        while len(self._shards) > OPEN_SHARDS:
            self._shards.popitem(last=False)
        return shard

    def failed(self) -> dict[int, str]:
        """The sequences that have no tracks because their scene could not be read, and why."""
        reasons: dict[int, str] = {}
        for number in range(self.plan.shards):
            reasons |= {int(index): reason for index, reason in _header(self._shard(number))["failed"].items()}
        return reasons

    def verify(self) -> Iterator[tuple[int, bool]]:
        """Each shard's number, and whether its arrays are those that were written."""
        for number in range(self.plan.shards):
            try:
                shard = self._shard(number)
                arrays = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a dict)
                yield number, _header(shard)["checksum"] == checksum(arrays)
            except (OSError, ValueError):
                yield number, False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": OrderedDict()}

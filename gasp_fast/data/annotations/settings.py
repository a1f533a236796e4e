"""`AnnotationSettings`: everything that determines the content of an annotation folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from gasp_fast.config.limits import MOST
from gasp_fast.data.errors import difference, one_line, shown
from gasp_fast.data.scenes.library import SceneEntry
from gasp_fast.data.tracks.build import LARGEST_GRID
from gasp_fast.data.tracks.sequences import SequenceConfig, SequenceSampler
from gasp_fast.files import create_atomically, read_json, write_atomically

VERSION = 1  # of the settings file and of shards
MOST_SHARDS = 100_000  # their names have five digits
LARGEST_SHARD = 4e9  # bytes; a shard is held in memory while it is computed
_KINDS: dict[str, Any] = {"int": int, "float": int | float, "str": str, "tuple[SceneEntry, ...]": list}
SETTINGS_FILE = "plan.json"  # the name in folders written before
SKIPPED_FILE = "skipped.json"  # scenes of the library that were left out: {name: reason}


@dataclass(frozen=True, kw_only=True)
class AnnotationSettings:
    """Scenes, sampler and track grid. With `n` sequences an epoch, sequence `i` is number `i % n` of epoch `i // n`."""

    scenes: tuple[SceneEntry, ...]
    sequences: SequenceConfig = field(default_factory=SequenceConfig)
    grid: int = 8
    keep: float = 0.5
    epochs: int = 1
    shard_size: int = 1024  # sequences

    def __post_init__(self) -> None:
        for name, most in (("grid", LARGEST_GRID), ("epochs", MOST), ("shard_size", MOST)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} = {getattr(self, name)}: must lie in 1..{most}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep = {self.keep}: must be above 0 and at most 1")

    @cached_property
    def sampler(self) -> SequenceSampler:
        return SequenceSampler([s.frames for s in self.scenes], self.sequences, [s.name for s in self.scenes])

    def __len__(self) -> int:
        return len(self.sampler) * self.epochs

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self) // self.shard_size)

    def sequences_in_shard(self, number: int) -> range:
        """Indices of the sequences of a shard."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, len(self)))

    @property
    def bytes_of_sequence(self) -> float:
        """An upper estimate: every query is tracked, and the sequence has the mean number of frames."""
        frames = (self.sequences.min_frames + self.sequences.max_frames) / 2
        tracks = self.grid**2 * self.keep
        return tracks * frames * 13 + tracks * 8 + frames * 4 + 28

    @property
    def expected_bytes(self) -> int:
        """An upper estimate of the size on disk."""
        return int(len(self) * self.bytes_of_sequence)

    def check_shard_size(self) -> None:
        """Raises if a shard does not fit the memory of a process. Needs no scenes."""
        if (size := self.bytes_of_sequence * self.shard_size) > LARGEST_SHARD:
            fitting = int(LARGEST_SHARD / self.bytes_of_sequence)
            cure = f"give at most {fitting}" if fitting else f"lower grid = {self.grid}"
            raise ValueError(
                f"shard_size = {self.shard_size}: a shard would have up to {size / 1e9:,.1f} GB, more than "
                f"{LARGEST_SHARD / 1e9:g}; {cure}"
            )

    def to_json(self) -> str:
        return json.dumps({"format": "gasp-fast tracks", "version": VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, stored: Any) -> AnnotationSettings:
        """From the value of what `to_json` wrote."""
        if not isinstance(stored, dict) or stored.pop("format", None) != "gasp-fast tracks" or "version" not in stored:
            raise ValueError("not the settings of gasp-fast tracks")
        version = stored.pop("version")
        if version != VERSION:
            raise ValueError(
                f"has version {shown(version)}, this program reads version {VERSION}; make the annotations again"
            )
        settings: AnnotationSettings = _from_fields(cls, stored)
        scenes = tuple(_from_fields(SceneEntry, entry) for entry in settings.scenes)
        return replace(settings, scenes=scenes, sequences=_from_fields(SequenceConfig, settings.sequences))

    @cached_property
    def digest(self) -> str:
        return blake2b(self.to_json().encode(), digest_size=16).hexdigest()


def read_settings(folder: Path) -> AnnotationSettings:
    """The settings in `folder`. A damaged file is a one-line `ValueError` that names it."""
    path = folder / SETTINGS_FILE
    try:
        settings = AnnotationSettings.from_json(read_json(path))
        len(settings)  # raises for scenes that the sampler does not take
        return settings
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: cannot read the settings: {one_line(error)}") from error


def store_settings(folder: Path, settings: AnnotationSettings, skipped: Mapping[str, str] | None = None) -> None:
    """Writes the settings, and the scenes that were left out, into `folder`.

    If it holds other settings, an error names the first difference. Jobs that start at the same time may call this at
    the same time: the settings of the first one stay.
    """
    settings.check_shard_size()
    if settings.shards > MOST_SHARDS:
        raise ValueError(
            f"{len(settings):,} sequences in {settings.shards:,} shards: at most {MOST_SHARDS:,}; raise shard_size"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_FILE
    if not path.exists():
        if skipped:
            write_atomically(folder / SKIPPED_FILE, (json.dumps(dict(skipped), indent=1) + "\n").encode())
        create_atomically(path, settings.to_json().encode())
    if change := difference(asdict(read_settings(folder)), asdict(settings)):
        raise ValueError(f"{folder} holds annotations made with other settings ({change}); give another --out")


def read_skipped(folder: Path) -> dict[str, str]:
    """The scenes that were left out, and why."""
    path = folder / SKIPPED_FILE
    if not path.exists():
        return {}
    stored = read_json(path)
    if not isinstance(stored, dict) or not all(isinstance(reason, str) for reason in stored.values()):
        raise ValueError(f"{path}: not a list of scenes with reasons; delete it")
    return stored


def _from_fields(kind: type[Any], stored: Any) -> Any:
    """A dataclass from its JSON object, in which no field may be missing or unknown."""
    names = {one.name for one in fields(kind)}
    if not isinstance(stored, dict) or stored.keys() != names:
        keys = stored.keys() ^ names if isinstance(stored, dict) else names
        raise ValueError(f"missing or unknown fields of {kind.__name__}: {', '.join(sorted(keys))}")
    for one in fields(kind):
        allowed = _KINDS.get(str(one.type), object)
        if not isinstance(stored[one.name], allowed) or isinstance(stored[one.name], bool):
            raise ValueError(f"{kind.__name__}.{one.name} = {shown(stored[one.name])}: not of type {one.type}")
    return kind(**stored)

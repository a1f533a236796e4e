"""`AnnotationPlan`: everything that determines the content of an annotation folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from gasp_fast.data.scenes.library import SceneEntry
from gasp_fast.data.tracks.sequences import SequenceConfig, SequenceSampler
from gasp_fast.files import write_atomically

VERSION = 1  # of plans and shards
PLAN_FILE = "plan.json"


@dataclass(frozen=True, kw_only=True)
class AnnotationPlan:
    """Scenes, sampler and track grid. With `n` sequences an epoch, sequence `i` is number `i % n` of epoch `i // n`."""

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
        """Number of shards."""
        return -(-len(self) // self.shard_size)

    def of_shard(self, number: int) -> range:
        """Indices of the sequences of a shard."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, len(self)))

    @property
    def expected_bytes(self) -> int:
        """An upper estimate of the size on disk: every query is tracked, sequences have the mean number of frames."""
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
                f"the annotations have version {version}, this program reads version {VERSION}; make them again"
            )
        scenes = tuple(SceneEntry(**entry) for entry in fields.pop("scenes"))
        return cls(scenes=scenes, sequences=SequenceConfig(**fields.pop("sequences")), **fields)

    @cached_property
    def digest(self) -> str:
        return blake2b(self.to_json().encode(), digest_size=16).hexdigest()


def store_plan(folder: Path, plan: AnnotationPlan) -> None:
    """Writes the plan into `folder`. A folder that holds another plan is an error that names the first difference."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN_FILE
    if path.exists():
        difference = _difference(json.loads(path.read_text()), json.loads(plan.to_json()))
        if difference:
            raise ValueError(f"{folder} holds annotations of another plan ({difference}); give another --out")
        return
    write_atomically(path, plan.to_json().encode())


def _difference(old: Any, new: Any, name: str = "plan") -> str:
    """The first difference between two JSON values, in words; empty if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return next((d for key in old if (d := _difference(old[key], new[key], key))), "")
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{name}: {len(old)} there, {len(new)} now"
        return next((d for a, b in zip(old, new, strict=True) if (d := _difference(a, b, name))), "")
    return "" if old == new else f"{name}: {old} there, {new} now"

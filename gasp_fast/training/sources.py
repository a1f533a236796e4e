"""Sources of training samples: tracked scenes, and questions about videos."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from gasp_fast.backbones import messages_from_record
from gasp_fast.collator import Sample, geometry_sample
from gasp_fast.config.limits import LARGEST_SEED, MOST, check_whole
from gasp_fast.data.annotations.inventory import Inventory
from gasp_fast.data.annotations.read import AnnotationReader
from gasp_fast.data.permutation import permuted
from gasp_fast.data.questions.scene_frames import FrameReader, Rectangle, SceneFrames
from gasp_fast.data.questions.video_qa import QASample, VideoQA
from gasp_fast.data.scenes.library import SceneEntry, find_scenes, folder_name, survey
from gasp_fast.data.scenes.open_scenes import OpenScenes
from gasp_fast.data.tracks.build import LARGEST_GRID, Order, Tracks, build_tracks
from gasp_fast.data.tracks.sequences import SequenceConfig, SequenceSampler, is_held_out
from gasp_fast.planning.assumptions import Assumptions

from .replacing import TRIES, Replacing
from .skipped import Skipped

ENCODED_TRIES = 8  # samples tried in place of one that can be read but not encoded, which takes longer to find out


@dataclass(frozen=True, kw_only=True)
class TrainingSample(Sample):
    """A sample of a source, and the samples that were skipped before it."""

    index: int  # in the source
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True)
class Outline:
    """What is known of a sample before it is read."""

    frames: int
    texts: tuple[str, ...] = ()  # questions and answers by turns; none for a scene


class Samples(Replacing[Sample]):
    """A source of samples: `len` of them in an epoch, each made on request."""

    kinds: tuple[str, str]  # what is at fault where a sample cannot be read, and where it cannot be encoded
    one_frame_size: bool  # whether the frames of all samples usually have one size
    found: int  # scenes or records
    left_out: list[Skipped]  # those of them that cannot be used
    remarks: list[str]  # lines about the data, for the first process to print

    @abstractmethod
    def outline(self, epoch: int, index: int) -> Outline:
        """Of sample `index`. Reads no file."""

    @abstractmethod
    def frame_size_of(self, index: int) -> tuple[int, int]:
        """(width, height) of a frame of sample `index`. Raises if it cannot be read."""

    def frame_size(self) -> tuple[int, int]:
        """(width, height) of a frame of the first of some samples that can be read."""
        count = min(TRIES, len(self))
        for number in range(count):
            with suppress(Exception):  # the same that loading it would raise, and report
                return self.frame_size_of(number * len(self) // count)
        return Assumptions().source_frame

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What the source reads, in few words. Other data has another fingerprint."""

    def sample(self, epoch: int, index: int, position: int, skipped: Sequence[Skipped] = ()) -> TrainingSample:
        """Sample `index`, or another one in its place, as in `first_usable`."""
        sample, used, skipped = self.first_usable(epoch, index, position, skipped)
        return TrainingSample(**vars(sample), index=used, skipped=tuple(skipped))

    def instead_of(self, sample: TrainingSample, epoch: int, index: int, error: Exception) -> TrainingSample:
        """Another sample for one that cannot be encoded. `index` was drawn; the sample may already be in its place."""
        skipped = [*sample.skipped, self.fault(self.kinds[1], sample.index, sample.position, error)]
        if sum(one.kind == self.kinds[1] for one in skipped) > ENCODED_TRIES:
            raise self.unusable(skipped)
        return self.sample(epoch, index, sample.position, skipped)


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """Sequences of posed frames with depth, which give tracks."""

    root: str = ""  # folder of scenes; empty: none
    weight: float = 1.0  # relative to the other sources; 0: not read
    annotations: tuple[str, ...] = ()  # folders of `gasp-fast tracks`, of the same sequences; empty: track on the fly
    grids: tuple[int, ...] = (8, 24)  # query points along a side, coarse and fine; for tracking on the fly
    keep: float = 0.5  # share of the tracks to keep; for tracking on the fly
    order: Order = "anchor_first"  # of a sequence's frames, as the model sees them; or chronological
    held_out: float = 0.0  # share of the scenes that is never trained on
    only_counted: bool = False  # not trained on, but epochs and steps are those of a run that trains on them
    sequences: SequenceConfig = field(default_factory=SequenceConfig)  # for tracking on the fly

    def __post_init__(self) -> None:
        if not self.annotations and not (self.grids and all(1 <= grid <= LARGEST_GRID for grid in self.grids)):
            raise ValueError(
                f"data.scenes.grids = {list(self.grids)} must name at least one grid, each of 1 to {LARGEST_GRID} "
                "points along a side, such as [8, 24]"
            )
        if not 0 < self.keep <= 1:
            raise ValueError(f"data.scenes.keep = {self.keep} is a share of the tracks; give 0 < keep <= 1")
        if not 0 <= self.held_out <= 1:
            raise ValueError(f"data.scenes.held_out = {self.held_out} is a share of the scenes; give 0 to 1")


class TrackedScenes(Samples):
    """Sequences of scenes with their tracks, which are read from annotations or computed on the fly."""

    kinds = ("scene", "sequence")
    advice = ""
    one_frame_size = True

    def __init__(self, config: ScenesConfig, workers: int = 1) -> None:
        """Without annotations, opens every scene once, in as many processes as there are `workers`."""
        self.config, self.root, self.left_out, self.remarks = config, config.root, [], []
        self.caches: list[AnnotationReader] = []
        self.annotated: dict[str, str] = {}  # digest of each folder of annotations
        self.epochs = 0  # that are annotated
        entries = self._read_annotations() if config.annotations else self._survey(workers)
        library, self.found = Path(config.root), len(entries) + len(self.left_out)
        self.names = [entry.name for entry in entries]
        self.open = OpenScenes(library, entries={entry.name: entry for entry in entries})
        # By the folder's own name, as in `gasp-fast tracks` and `evaluate`: it is the same wherever the library is.
        folder_names = [folder_name(library, name) for name in self.names]
        self._trained = [n for n, name in enumerate(folder_names) if not is_held_out(name, config.held_out)]
        if not self._trained:
            raise ValueError(
                f"data.scenes.held_out = {config.held_out} leaves none of {len(self.names)} scenes for training; "
                "lower it or add scenes"
            )

    def _read_annotations(self) -> list[SceneEntry]:
        self.caches = [AnnotationReader(folder) for folder in self.config.annotations]
        inventories = {cache: cache.check_complete() for cache in self.caches}
        self.remarks = [line for cache, found in inventories.items() for line in what_is_missing(cache, found)]
        self.annotated = {
            str(cache.folder): f"{cache.settings.digest}-{found.digest}" for cache, found in inventories.items()
        }
        settings = self.caches[0].settings
        for cache in self.caches[1:]:
            if (cache.settings.scenes, cache.settings.sequences) != (settings.scenes, settings.sequences):
                raise ValueError(
                    f"{cache.folder} annotates other sequences than {self.caches[0].folder}; annotations that are "
                    "used together must differ in their grid only"
                )
        self.sampler, self.epochs = settings.sampler, settings.epochs
        return list(settings.scenes)

    def _survey(self, workers: int) -> list[SceneEntry]:
        entries, self.left_out = usable_scenes(self.root, workers, "data.scenes.root")
        names = [entry.name for entry in entries]
        self.sampler = SequenceSampler([entry.frames for entry in entries], self.config.sequences, names)
        return entries

    def __len__(self) -> int:
        return len(self._trained) * self.sampler.config.per_scene

    def load(self, epoch: int, index: int, position: int) -> Sample:
        sequence = self._sequence(index)
        name = self.names[sequence // self.sampler.config.per_scene]
        tracks = self._tracks(epoch, sequence)
        if self.config.order == "chronological":
            tracks = [one.in_temporal_order() for one in tracks]
        return geometry_sample(self.open[name], tracks, position)

    def outline(self, epoch: int, index: int) -> Outline:
        return Outline(self.sampler.frame_count(epoch % self.epochs if self.caches else epoch, self._sequence(index)))

    def frame_size_of(self, index: int) -> tuple[int, int]:
        return self.open[self.names[self._sequence(index) // self.sampler.config.per_scene]].image_size(0)

    def name(self, index: int) -> str:
        scene, place = divmod(self._sequence(index), self.sampler.config.per_scene)
        return f"{self.names[scene]}, sequence {place}"

    def fingerprint(self) -> dict[str, Any]:
        scenes = repr([(name, entry.digest) for name, entry in self.open.entries.items()])
        return {
            "scenes": len(self.names),
            "digest": blake2b(scenes.encode(), digest_size=16).hexdigest(),  # of the names, frames and poses
            "annotations": self.annotated,
        }

    def _sequence(self, index: int) -> int:
        """The number of a training sequence among those of all scenes, held out ones included."""
        scene, place = divmod(index, self.sampler.config.per_scene)
        return self._trained[scene] * self.sampler.config.per_scene + place

    def _tracks(self, epoch: int, sequence: int) -> list[Tracks]:
        if self.caches:
            at = (epoch % self.epochs) * len(self.sampler) + sequence
            return [cache[at].tracks for cache in self.caches]
        drawn = self.sampler.draw(epoch, sequence)
        scene = self.open[self.names[drawn.scene]]
        return [build_tracks(scene, drawn.frames, grid, self.config.keep) for grid in self.config.grids]


def usable_scenes(root: str, workers: int, key: str) -> tuple[list[SceneEntry], list[Skipped]]:
    """The scenes under `root` that have depth, and the others. `key` is the place of `root` in a recipe."""
    entries, left_out, library = [], [], Path(root)
    for entry in survey(library, find_scenes(library), workers):
        if isinstance(entry, tuple):
            name, reason = entry
            left_out.append(Skipped("scene", f"{root}/{name}", reason))
        else:
            entries.append(entry)
    if not entries:
        raise ValueError(f"{key} = {root!r} has no usable scene; the first, {left_out[0]}")
    return entries, left_out


def what_is_missing(cache: AnnotationReader, found: Inventory) -> Iterator[str]:
    """A line each for the scenes and the sequences that the annotations leave out."""
    if skipped := cache.skipped():
        count = f"{len(skipped):,} of {len(skipped) + len(cache.settings.scenes):,} scenes"
        name, reason = next(iter(skipped.items()))
        yield f"{cache.folder}: without {count}; the first, {name}: {reason}"
    if failed := found.failed:
        count = f"{len(failed):,} of {len(cache):,} sequences"
        yield f"{cache.folder}: no tracks for {count}; the first, {next(iter(failed.values()))}"


@dataclass(frozen=True, kw_only=True)
class QAConfig:
    """Questions and answers in the schema of LLaVA-Video: about videos, or about frames of `data.scenes.root`."""

    root: str = ""  # folder of JSON lists; empty: none
    videos: str = ""  # folder of videos, if they are not beside the lists; absolute paths in records lead into it
    weight: float = 1.0  # relative to the other sources; 0: not read
    configs: tuple[str, ...] = ()  # its sub-folders to read; empty: all
    limit: int | None = None  # a random subset of so many questions; null: all
    seed: int = 0  # of that subset
    frames: int | None = 16  # taken from each video; null: the records name frames, as those of make-vqa, and all count
    longest_side: int | None = None  # shrink frames to this while decoding
    timeout: float = 30.0  # seconds to decode a video

    def __post_init__(self) -> None:
        check_whole(self, ("frames", "longest_side"))
        check_whole(self, ("limit",), most=1 << 40)
        check_whole(self, ("seed",), least=0, most=LARGEST_SEED)
        if not 0 < self.timeout <= MOST:
            raise ValueError(f"timeout = {self.timeout} must be above 0 and at most {MOST:,} (seconds)")


class VideoQuestions(Samples):
    """Questions about videos or about frames of scenes, as samples without tracks."""

    def __init__(self, config: QAConfig, key: str = "data.qa", scenes: ScenesConfig | None = None) -> None:
        """`key` is the place of `config` in a recipe, for messages; `scenes` are those whose frames records name."""
        self.config, self.root, self.remarks = config, config.root, []
        self.kinds, self.advice = ("video", "question"), "; are the archives unpacked beside their JSON lists?"
        self.one_frame_size, reader = False, None
        if config.frames is None:
            assert scenes is not None
            self.kinds, self.advice, self.one_frame_size = ("scene", "question"), "", True
            reader = FrameReader(Path(scenes.root), scenes.held_out)
        self.records = VideoQA(
            Path(config.root), config.configs, reader, Path(config.videos) if config.videos else None
        )
        faults = self.records.skipped.items()
        self.left_out = [Skipped("question", f"{self.root}/{name}", reason) for name, reason in faults]
        self.found = len(self.records) + len(faults)
        if config.limit is not None and config.limit > len(self.records):
            raise ValueError(
                f"{key}.limit = {config.limit} is more than the {len(self.records)} usable questions in {self.root}; "
                "lower it, or give null for all of them"
            )

    def __len__(self) -> int:
        return self.config.limit or len(self.records)

    def load(self, epoch: int, index: int, position: int) -> Sample:
        question = self._sample(index, self.config.frames)
        turns = [{"from": turn.speaker, "value": turn.text} for turn in question.record.turns]
        return Sample(frames=list(question.frames), messages=messages_from_record(turns), position=position)

    def outline(self, epoch: int, index: int) -> Outline:
        record = self.records.record(self._record(index))
        frames = record.about.frames if isinstance(record.about, SceneFrames) else ()
        return Outline(self.config.frames or len(frames), tuple(turn.text for turn in record.turns))

    def frame_size_of(self, index: int) -> tuple[int, int]:
        named = self.records.record(self._record(index)).about
        if isinstance(named, SceneFrames) and self.records.reader is not None:
            return self.records.reader.size(named)
        height, width = self._sample(index, 1).frames[0].shape[:2]
        return width, height

    def seen_part(self) -> tuple[tuple[int, int], Rectangle] | None:
        """The size of a frame that a record names, and the part of it that a model must see; None of videos."""
        if self.records.reader is None:
            return None
        for number in range(min(TRIES, len(self))):
            named = self.records.record(self._record(number)).about
            with suppress(OSError, ValueError):  # which loading it would raise, and report
                if isinstance(named, SceneFrames):
                    return self.records.reader.size(named), named.seen
        return None

    def _sample(self, index: int, frames: int | None) -> QASample:
        config, number = self.config, self._record(index)
        return self.records.sample(number, frames, timeout=config.timeout, longest_side=config.longest_side)

    def name(self, index: int) -> str:
        return self.records.name(self._record(index))

    def fingerprint(self) -> dict[str, Any]:
        subset = {} if self.config.limit is None else {"limit": self.config.limit, "seed": self.config.seed}
        return {"records": len(self.records), "digest": self.records.digest(), **subset}

    def _record(self, index: int) -> int:
        """The number of a question among all records. The subset is the beginning of a shuffled order of them."""
        if self.config.limit is None:
            return index
        return permuted(index, len(self.records), f"limit/{self.config.seed}")

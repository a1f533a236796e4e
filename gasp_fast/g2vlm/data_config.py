"""Keys of the scenes that a run of G²VLM reads, and the size of each pack."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from gasp_fast.config.limits import LARGEST_SEED, check_whole

from .batch import PATCH

MOST_FRAMES = 256  # of a sequence
MOST_SIDE = 4096  # pixels


@dataclass(frozen=True, kw_only=True)
class G2DataConfig:
    """Sequences of posed frames with depth, all of a step with the same number of frames and the same size."""

    roots: tuple[str, ...] = ()  # folders of scenes
    weights: tuple[float, ...] = ()  # one for each root, relative to the others; empty: equal
    with_normals: tuple[bool, ...] = ()  # for each root, whether its depth is smooth enough for normals; empty: all
    questions: str = ""  # for the joint stage: records of `make-vqa` about frames of the first root; empty: none
    min_frames: int = 2  # of a sequence; the number is drawn for each step
    max_frames: int = 24  # of a sequence; scenes with fewer frames are left out
    min_gap: int = 1  # frames from one of a sequence to its next; smaller in scenes that are too short for it
    max_gap: int = 8  # the gap is drawn
    per_scene: int = 16  # sequences of each scene in an epoch
    side: int = 224  # of a square with as many pixels as a frame gets; sides are rounded to multiples of 14
    min_aspect: float = 1.0  # least width / height of frames; drawn for each step
    max_aspect: float = 1.0  # largest width / height
    shift: float = 0.5  # how far crops are moved from the middle at random; 0: not at all, 1: as far as the edge
    max_depth: float | None = None  # in the scenes' unit; points beyond it do not count; null: all count
    jitter: float = 0.0  # largest relative change of each frame's brightness, contrast and saturation; 0: none
    held_out: float = 0.0  # share of the scenes that is never trained on, but evaluated
    workers: int = 4  # loader processes of each training process; 0: load in the training process
    seed: int = 0  # of all that is drawn

    def __post_init__(self) -> None:
        check_whole(self, ("min_gap", "max_gap", "per_scene"))
        check_whole(self, ("workers",), least=0, most=1024)
        check_whole(self, ("seed",), least=0, most=LARGEST_SEED)
        check_whole(self, ("side",), least=PATCH, most=MOST_SIDE)
        if not 1 <= self.min_frames <= self.max_frames <= MOST_FRAMES:
            raise ValueError(
                f"min_frames = {self.min_frames}, max_frames = {self.max_frames}: need 1 <= min_frames <= max_frames "
                f"<= {MOST_FRAMES}"
            )
        if self.min_gap > self.max_gap:
            raise ValueError(f"min_gap = {self.min_gap} is above max_gap = {self.max_gap}; lower it")
        if not 0.1 <= self.min_aspect <= self.max_aspect <= 10:
            raise ValueError(
                f"min_aspect = {self.min_aspect}, max_aspect = {self.max_aspect}: need 0.1 <= min_aspect <= max_aspect "
                "<= 10 (width / height)"
            )
        for name in ("shift", "held_out"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} is a share; give 0 to 1")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter = {self.jitter} is a relative change; give 0 <= jitter < 1")
        if self.max_depth is not None and not 0 < self.max_depth < math.inf:
            raise ValueError(f"max_depth = {self.max_depth} must be above 0, or null for no limit")
        for name in ("weights", "with_normals"):
            if getattr(self, name) and len(getattr(self, name)) != len(self.roots):
                count = len(getattr(self, name))
                raise ValueError(f"{name} has {count} values for {len(self.roots)} roots; give one for each, or none")


@dataclass(frozen=True)
class PackShape:
    """What all sequences of a step have in common."""

    frames: int
    height: int  # pixels, multiples of 14, as is the width
    width: int

    @property
    def tokens(self) -> int:
        """Patches of a sequence."""
        return self.frames * self.height * self.width // PATCH**2


def shape_of_step(config: G2DataConfig, step: int, frames: int | None = None) -> PackShape:
    """The shape of the packs of a step, counted from 0; with another number of frames where `frames` is given."""
    # Only `random()`: Python guarantees that a seeded generator gives the same values in every version.
    uniform = random.Random(f"pack/{config.seed}/{step}").random
    drawn = config.min_frames + int(uniform() * (config.max_frames - config.min_frames + 1))
    low, high = math.log(config.min_aspect), math.log(config.max_aspect)
    height, width = frame_size(config.side, math.exp(low + uniform() * (high - low)))
    return PackShape(drawn if frames is None else frames, height, width)


def frame_size(side: int, aspect: float) -> tuple[int, int]:
    """(height, width) in multiples of 14, of about `side` squared pixels with the ratio `aspect` of width to height."""
    stretch = math.sqrt(aspect)
    return _whole_patches(side / stretch), _whole_patches(side * stretch)


def _whole_patches(pixels: float) -> int:
    return PATCH * max(1, round(pixels / PATCH))

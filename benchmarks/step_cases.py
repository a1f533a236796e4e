"""The cases that `step.py` measures: their order, configurations and batches. Runs no step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gasp_fast.backbones import load_backbone
from gasp_fast.backbones.adapters import AdapterConfig
from gasp_fast.backbones.base_model import ModelConfig
from gasp_fast.backbones.tiny import SIZES_7B, TinyConfig, build_tiny
from gasp_fast.collator import Sample
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes
from gasp_fast.data.tracks.sequences import SequenceConfig
from gasp_fast.supervision.heads import HeadsConfig
from gasp_fast.training.config import ObjectiveConfig, RunConfig, TrainConfig
from gasp_fast.training.optim import OptimisationConfig
from gasp_fast.training.sources import ScenesConfig
from gasp_fast.training.stream import DataConfig, SampleStream, Share, make_loader

WARM_UP, MEASURED = 2, 5
QUESTION = {"role": "user", "content": "Which way did the camera turn, and how many boxes are in the room?"}
ANSWER = {"role": "assistant", "content": "The camera turned to the left. There are 3 boxes: red, green, blue. " * 6}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the models, of the scenes and of a step."""

    models: dict[str, TinyConfig]
    ranks: dict[str, int]  # of the adapters
    scenes: SyntheticConfig
    scene_count: int
    batch_size: int  # sequences of a step: the share of one of 32 GPUs


SHAPES = {
    "7b": Shape(
        models=SIZES_7B,
        ranks={"qwen2_5_vl": 128, "llava_next_video": 512},
        scenes=SyntheticConfig(frames=26, width=960, height=540, samples=1),
        scene_count=4,
        batch_size=4,
    ),
    "tiny": Shape(
        models={
            name: TinyConfig(
                model_type=name, hidden_size=64, frame_size=112, vision_hidden_size=32, query_heads=2, layers=2
            )
            for name in SIZES_7B
        },
        ranks={"qwen2_5_vl": 4, "llava_next_video": 8},
        scenes=SyntheticConfig(frames=8, width=96, height=80, samples=1),
        scene_count=2,
        batch_size=2,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration of a step. The defaults are those of the recipes in configs/."""

    family: str
    frames: int
    geometry: bool = True
    checkpointing: str = "non_reentrant"
    attention: str = "sdpa"
    liger: bool = False
    heads: str = "tf32"
    at_once: int = 1
    profile: bool = False

    @property
    def name(self) -> str:
        words = [self.family, f"{self.frames} frames", "geometry" if self.geometry else "plain"]
        for field in ("checkpointing", "attention", "heads"):
            words += [f"{field} {getattr(self, field)}"] * (getattr(self, field) != getattr(Case, field))
        words += ["liger"] * self.liger + [f"{self.at_once} at once"] * (self.at_once > 1)
        return ", ".join(words)


def cases(shape: str) -> Iterator[Case]:
    """The cases of `shape`, the most important ones first."""
    qwen, llava = (partial(Case, family=name) for name in ("qwen2_5_vl", "llava_next_video"))
    if shape == "tiny":
        for case in (qwen, llava):
            yield case(frames=3, profile=True)
            yield case(frames=3, geometry=False)
        yield qwen(frames=2, heads="bf16", checkpointing="off", at_once=2)
        yield qwen(frames=2, attention="flash_attention_2")
        yield qwen(frames=2, liger=True)
        return
    for case, frames in ((qwen, 24), (llava, 16), (llava, 24)):
        yield case(frames=frames, profile=True)
        yield case(frames=frames, geometry=False)
    yield qwen(frames=24, heads="bf16")
    yield llava(frames=16, checkpointing="off")
    yield llava(frames=16, checkpointing="off", heads="bf16")
    yield qwen(frames=24, liger=True)
    yield llava(frames=16, liger=True)
    yield qwen(frames=24, attention="flash_attention_2")
    yield llava(frames=16, attention="flash_attention_2")
    for frames in (16, 8):
        yield qwen(frames=frames)
        yield qwen(frames=frames, geometry=False)
    yield qwen(frames=8, checkpointing="off")
    yield qwen(frames=24, checkpointing="off")
    yield qwen(frames=24, checkpointing="off", geometry=False)
    yield qwen(frames=24, heads="fp32")
    yield llava(frames=16, at_once=4)
    yield llava(frames=8)
    yield llava(frames=8, geometry=False)
    yield llava(frames=24, checkpointing="off")


# ---- configurations and batches -------------------------------------------------------------------------------------


class CaseData:
    """Scenes, models without weights, and the batches of each case."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        self.shape, self.folder = shape, folder
        self.models = {name: build_tiny(folder / name, config, weights=False) for name, config in shape.models.items()}
        list(render_scenes(folder / "scenes", shape.scene_count, config=shape.scenes, workers=shape.scene_count))
        self._batches: dict[tuple[str, int, int], tuple[list[dict[str, Any]], float]] = {}

    def config(self, case: Case) -> TrainConfig:
        """The run that trains the case."""
        weights = {} if case.geometry else {"corr_weight": 0.0, "depth_weight": 0.0}
        sequences = SequenceConfig(min_frames=case.frames, max_frames=case.frames, window=case.frames, per_scene=4)
        # Random heads, of the same sizes as those from W_Q: the SVD would take longer than the steps.
        return TrainConfig(
            model=ModelConfig(source=str(self.models[case.family]), attention=case.attention, liger=case.liger),  # type: ignore[arg-type]
            train=OptimisationConfig(
                steps=WARM_UP + MEASURED + case.profile,
                batch_size=self.shape.batch_size,
                micro_batch_size=case.at_once,
                checkpointing=case.checkpointing,  # type: ignore[arg-type]
            ),
            lora=AdapterConfig(rank=self.shape.ranks[case.family]),
            heads=HeadsConfig(init="random", compute=case.heads),  # type: ignore[arg-type]
            loss=ObjectiveConfig(**weights),
            data=DataConfig(scenes=ScenesConfig(root=str(self.folder / "scenes"), sequences=sequences), workers=0),
            run=RunConfig(out=str(self.folder / "run"), progress=False),
        )

    def batches(self, case: Case, config: TrainConfig, pin: bool) -> tuple[list[dict[str, Any]], float]:
        """The micro-batches of one step, from the real loader, and the seconds that one process loads a sequence."""
        key = (case.family, case.frames, case.at_once)
        if key not in self._batches:
            backbone = load_backbone(config.model.source)
            share = Share(0, 1, config.train.batch_size, case.at_once)
            start = time.perf_counter()
            loader = make_loader(config.data, AnsweredStream(config.data), backbone, share, 1, pin_memory=pin)
            batches = list(loader)
            self._batches[key] = batches, (time.perf_counter() - start) / config.train.batch_size
        return self._batches[key]


class AnsweredStream(SampleStream):
    """The stream of sequences with tracks, each with a question and its answer."""

    def __getitem__(self, position: int) -> Sample:
        return dataclasses.replace(super().__getitem__(position), messages=[QUESTION, ANSWER])

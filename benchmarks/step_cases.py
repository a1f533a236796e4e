"""The cases that `step.py` measures: their order, configurations and batches. Runs no step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from gasp_fast.backbones import load_backbone
from gasp_fast.backbones.adapters import AdapterConfig
from gasp_fast.backbones.base_model import ModelConfig
from gasp_fast.backbones.tiny import SIZES_7B, TinyConfig, build_tiny
from gasp_fast.collator import Sample
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes
from gasp_fast.data.tracks.sequences import SequenceConfig
from gasp_fast.supervision.heads import HeadsConfig
from gasp_fast.training.config import ObjectiveConfig, RunConfig, TrainConfig
from gasp_fast.training.loader import make_loader
from gasp_fast.training.model import SupervisedModel
from gasp_fast.training.optim import OptimisationConfig
from gasp_fast.training.sources import ScenesConfig
from gasp_fast.training.stream import DataConfig, SampleStream, Share
from gasp_fast.training.workload import BatchFlops

WARM_UP, ROUNDS = 2, 6
STEPS = 1000  # of the schedule; a case ends long before
QUESTION = {"role": "user", "content": "Which way did the camera turn, and how many boxes are in the room?"}
ANSWER = {"role": "assistant", "content": "The camera turned to the left. There are 3 boxes: red, green, blue. " * 6}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the models, of the scenes and of a step."""

    models: dict[str, TinyConfig]
    ranks: dict[str, int]  # of the adapters
    scenes: SyntheticConfig
    scene_count: int
    batch_sizes: dict[str, int]  # sequences of a step


SHAPES = {
    "7b": Shape(
        models=SIZES_7B,
        ranks={"qwen2_5_vl": 128, "llava_next_video": 512},
        scenes=SyntheticConfig(frames=26, width=960, height=540, samples=1),
        scene_count=4,
        # The recipes' share of one of 32 GPUs is 4. Four long sequences, one after the other, tell no more than one.
        batch_sizes={"qwen2_5_vl": 1, "llava_next_video": 4},
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
        batch_sizes={"qwen2_5_vl": 2, "llava_next_video": 2},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration of a step. None is the default of a run."""

    family: str
    frames: int
    trainer: bool = False  # the usual step, without anything of gasp_fast
    geometry: bool = True
    checkpointing: str | None = None
    attention: str | None = None
    liger: bool | None = None
    heads: str | None = None
    workspace: int | None = None  # MiB, of the loss
    at_once: int = 1
    profile: bool = False
    essential: bool = False  # the targets are about these

    @property
    def name(self) -> str:
        kind = "Trainer" if self.trainer else "geometry" if self.geometry else "plain"
        words = [self.family, f"{self.frames} frames", kind]
        for field in ("checkpointing", "attention", "heads", "workspace"):
            words += [f"{field} {getattr(self, field)}"] * (getattr(self, field) is not None)
        words += [] if self.liger is None else ["liger" if self.liger else "without liger"]
        words += [f"{self.at_once} at once"] * (self.at_once > 1)
        return ", ".join(words)


Group = tuple[Case, ...]  # of one family, with the same batches and the same attention


def groups(shape: str) -> Iterator[Group]:
    """The cases of `shape`, the most important groups first."""
    qwen, llava = (partial(Case, family=name) for name in SIZES_7B)
    if shape == "tiny":
        yield _beside_trainer(partial(qwen, frames=3))
        yield _beside_trainer(partial(llava, frames=3))
        yield (qwen(frames=2, heads="bf16", checkpointing="off", at_once=2),)
        yield (qwen(frames=2, attention="flash_attention_2"),)
        yield (qwen(frames=2, liger=True),)
        return
    yield _beside_trainer(partial(qwen, frames=24))
    yield _beside_trainer(partial(llava, frames=16, at_once=4))
    for case in (partial(qwen, frames=24), partial(llava, frames=16, at_once=4)):
        yield case(heads="tf32"), case(checkpointing="off")
        yield (case(liger=False),)  # alone: Liger changes transformers' own modules
        yield (case(attention="flash_attention_2"),)
    yield llava(frames=16), llava(frames=16, trainer=True), llava(frames=16, geometry=False)
    yield llava(frames=24), llava(frames=24, geometry=False)
    for frames in (16, 8):
        yield qwen(frames=frames), qwen(frames=frames, trainer=True), qwen(frames=frames, geometry=False)


def _beside_trainer(case: Callable[..., Case]) -> Group:
    """The essential group of a family."""
    case = partial(case, essential=True)
    return case(profile=True), case(trainer=True, geometry=False, profile=True), case(geometry=False)


# ---- configurations and batches -------------------------------------------------------------------------------------


class CaseData:
    """Scenes, models without weights, and the batches of each case."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        self.shape, self.folder = shape, folder
        self.models = {name: build_tiny(folder / name, config, weights=False) for name, config in shape.models.items()}
        list(render_scenes(folder / "scenes", shape.scene_count, config=shape.scenes, workers=shape.scene_count))
        self._batches: dict[tuple[str, int, int], tuple[list[dict[str, Any]], float]] = {}
        self._flops: dict[Case, BatchFlops] = {}

    def config(self, case: Case) -> TrainConfig:
        """The run that trains the case."""
        weights = {} if case.geometry else {"corr_weight": 0.0, "depth_weight": 0.0}
        sequences = SequenceConfig(min_frames=case.frames, max_frames=case.frames, window=case.frames, per_scene=4)

        def chosen(**fields: str) -> dict[str, Any]:
            return {f: getattr(case, name) for f, name in fields.items() if getattr(case, name) is not None}

        # Random heads, of the same sizes as those from W_Q: the SVD would take longer than the steps.
        return TrainConfig(
            model=ModelConfig(source=str(self.models[case.family]), **chosen(attention="attention", liger="liger")),
            train=OptimisationConfig(
                steps=STEPS,
                batch_size=self.shape.batch_sizes[case.family],
                micro_batch_size=case.at_once,
                **chosen(checkpointing="checkpointing"),
            ),
            lora=AdapterConfig(rank=self.shape.ranks[case.family]),
            heads=HeadsConfig(init="random", **chosen(compute="heads")),
            loss=ObjectiveConfig(**weights, **chosen(workspace="workspace")),
            data=DataConfig(scenes=ScenesConfig(root=str(self.folder / "scenes"), sequences=sequences), workers=0),
            run=RunConfig(out=str(self.folder / "run"), progress=False),
        )

    def flops(self, case: Case) -> BatchFlops:
        """Counts the model FLOPs of the case's batches."""
        if case not in self._flops:
            config = self.config(case)
            backbone = load_backbone(config.model.source)
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(backbone.config)
            self._flops[case] = BatchFlops(config, SupervisedModel(backbone, model, None))
        return self._flops[case]

    def batches(self, case: Case, pin: bool = False) -> tuple[list[dict[str, Any]], float]:
        """The micro-batches of one step, from the real loader, and the seconds that one process loads a sequence."""
        key = (case.family, case.frames, case.at_once)
        if key not in self._batches:
            config = self.config(case)
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

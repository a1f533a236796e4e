"""Tiny models of the real classes, a few rendered scenes, questions about them, and configurations of small runs."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from gasp_fast.backbones.adapters import AdapterConfig
from gasp_fast.backbones.base_model import ModelConfig
from gasp_fast.backbones.tiny import TinyConfig, build_tiny
from gasp_fast.data.questions.scene_frames import Rectangle, SceneFrames
from gasp_fast.data.questions.video_qa import record_json
from gasp_fast.data.scenes.library import scene_digest
from gasp_fast.data.scenes.open import open_scene
from gasp_fast.data.synthetic.scenes import SyntheticConfig, make_scene, write_scene
from gasp_fast.data.tracks.sequences import SequenceConfig
from gasp_fast.loss.function import gasp_loss
from gasp_fast.supervision.heads import HeadsConfig
from gasp_fast.training.config import ObjectiveConfig, RunConfig, TrainConfig
from gasp_fast.training.distributed import Processes
from gasp_fast.training.gasp import Gasp
from gasp_fast.training.loop import TrainingLoop
from gasp_fast.training.model import build_model
from gasp_fast.training.optim import OptimisationConfig
from gasp_fast.training.sources import QAConfig, ScenesConfig
from gasp_fast.training.stream import DataConfig, SampleStream, Share

from .forked import save_no_figure

torch.set_num_threads(1)
FAMILIES = ("qwen2_5_vl", "llava_next_video")


class Models(dict[str, Path]):
    """Tiny models by family, each made when it is first used."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> Path:
        tiny = TinyConfig(
            model_type=name,
            hidden_size=64,
            frame_size=112,
            vision_hidden_size=32,
            vision_intermediate_size=84,  # an MLP that is padded, like that of Qwen2.5-VL-7B
            query_heads=2,
        )
        self[name] = build_tiny(self.root / name, tiny)
        return self[name]


@dataclass(frozen=True)
class Assets:
    """The inputs of a small run."""

    models: Models
    scenes: Path

    @cached_property
    def questions(self) -> Path:
        """About videos of the scenes. Written when they are first used, which needs PyAV."""
        from gasp_fast.data.synthetic.questions import write_qa

        folder = self.scenes.parent / "questions"
        list(write_qa(sorted(self.scenes.iterdir()), folder, workers=1))
        return folder


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    root = tmp_path_factory.mktemp("assets")
    look = SyntheticConfig(frames=10, width=96, height=80, samples=1)
    (root / "scenes").mkdir()
    for seed in range(4):
        write_scene(make_scene(seed, look), root / "scenes" / f"scene-{seed}")
    return Assets(Models(root), root / "scenes")


def write_questions(folder: Path, scenes: Path, seen: Rectangle = (0, 0, 96, 80)) -> Path:
    """Records about two or three frames of the scenes, for a model that sees this part of a frame."""
    records = []
    for number in range(8):
        name = f"scene-{number % 4}"
        frames = SceneFrames(name, scene_digest(open_scene(scenes / name)), (1, 4, 6)[: 2 + number % 2], seen)
        texts = ["<image>\nHow many boxes?" + " Count well." * number, f"There are {number}."]
        records.append(record_json(str(number), texts, "test", frames))
    folder.mkdir(exist_ok=True)
    (folder / "records.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="session")
def questions(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About frames of the scenes."""
    return write_questions(tmp_path_factory.mktemp("records"), assets.scenes)


@pytest.fixture(autouse=True)
def figure_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw none. A test file whose subject they are overrides this."""
    monkeypatch.setattr("gasp_fast.training.summary.save_figure", save_no_figure)


@pytest.fixture
def config(assets: Assets, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes configurations of small runs on scenes; `mixed` adds questions. Keyword arguments replace fields."""

    def make(family: str = "qwen2_5_vl", mixed: bool = False, **parts: dict[str, Any]) -> TrainConfig:
        unknown = parts.keys() - {"model", "train", "lora", "loss", "heads", "scenes", "qa", "run"}
        assert not unknown, unknown

        def part(kind: Any, name: str, **fields: Any) -> Any:
            return kind(**{**fields, **parts.get(name, {})})

        return TrainConfig(
            model=part(ModelConfig, "model", source=str(assets.models[family]), dtype="fp32"),
            train=part(OptimisationConfig, "train", steps=3, batch_size=2, learning_rate=1e-3, checkpointing="off"),
            lora=part(AdapterConfig, "lora", rank=4),
            loss=part(ObjectiveConfig, "loss"),
            heads=part(HeadsConfig, "heads", compute="fp32"),
            data=DataConfig(
                scenes=part(
                    ScenesConfig,
                    "scenes",
                    root=str(assets.scenes),
                    grids=(8,),
                    sequences=SequenceConfig(min_frames=3, max_frames=3, window=4, per_scene=4),
                ),
                qa=part(QAConfig, "qa", root=str(assets.questions) if mixed else "", frames=2),
                workers=0,
            ),
            run=part(RunConfig, "run", out=str(tmp_path / "run"), progress=False, save_every=100),
        )

    return make


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def loop_on(device, settings, batches=2):
    """A training loop after its start, and the micro-batches of its first steps."""
    share = Share(0, 1, settings.train.batch_size, settings.train.micro_batch_size)
    model = build_model(settings, torch.device(device.type))
    loop = TrainingLoop(
        Gasp(settings, SampleStream(settings.data), model=model), share, settings.train.steps, Processes(0, 1, device)
    )
    _, loaded = loop.begin()
    return loop, [[next(loaded) for _ in range(share.accumulation)] for _ in range(batches)]


def plain_step(model, batch, weights=(0.3, 1.0), other_targets="negatives"):
    """The geometric loss of a batch by plain autograd: all hidden states are kept, all heads run at once."""
    matches, positions = batch["matches"], batch["visual_positions"]
    inputs = {name: value for name, value in batch.items() if name not in ("matches", "visual_positions", "labels")}
    inner = model.model
    layers = model.backbone.decoder_layers(inner)
    states, normed = [], []
    handles = [  # what enters the module behind a layer: Qwen3-VL adds to the outputs of its first layers
        module.register_forward_pre_hook(lambda m, args: states.append(args[0]))
        for module in (*layers[1:], model.backbone.final_norm(inner))
    ]
    handles += [layer.input_layernorm.register_forward_hook(lambda m, a, out: normed.append(out)) for layer in layers]
    inner(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    if model.supervision.reads == "output_normed":
        states = [*normed[1:], model.backbone.final_norm(inner)(states[-1])]
    elif model.supervision.reads == "layer_input_normed":
        states = normed
    rows = [states[n].flatten(0, 1)[positions] for n in model.supervision.layers]
    embeddings = [
        model.supervision.by_layer[str(n)].head(row) for n, row in zip(model.supervision.layers, rows, strict=True)
    ]
    return gasp_loss(
        torch.stack(embeddings), matches, corr_weight=weights[0], depth_weight=weights[1], return_metrics=True,
        backend="torch", other_targets=other_targets,
    )  # fmt: skip


def have_depth(matches):
    """Bool [M]: the matches that have a depth term."""
    known = matches.patch_depth > 0
    frames = list(pairwise(matches.frame_offsets.tolist()))
    own = [next(known[start:end].any() for start, end in frames if start <= at < end) for at in matches.target.tolist()]
    return (matches.target_depth > 0) & torch.tensor(own, dtype=torch.bool)


def backward_of_step(model, sequences, weights=None):
    """The loss of an optimiser step over `sequences`, each the batch of one; adds its gradient.

    The mean over the labelled tokens of all. Of the terms of matches, the mean over the sequences with matches; or with
    `weights`, a tensor [M] for each sequence, the weighted mean over all matches.
    """
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in sequences)
    geometric = sum(len(batch["matches"]) > 0 for batch in sequences)
    total = 0.0
    for number, batch in enumerate(sequences):
        corr, depth = 0.3 / max(1, geometric), 1 / max(1, geometric)
        if weights is not None:
            batch = {**batch, "matches": replace(batch["matches"], weight=weights[number])}
            corr = 0.3 * float(weights[number].sum() / sum(one.sum() for one in weights))
            of_depth = [one[have_depth(each["matches"])].sum() for one, each in zip(weights, sequences, strict=True)]
            depth = float(of_depth[number] / sum(of_depth))
        loss = plain_step(model, batch, (corr, depth)).loss
        labels = batch["labels"]
        if (labels != -100).any():
            inputs = {name: v for name, v in batch.items() if name not in ("matches", "visual_positions", "labels")}
            logits = model.model(**inputs, use_cache=False).logits
            summed = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            loss = loss + summed / tokens
        loss.backward()
        total += loss.item()
    return total


@pytest.fixture(name="plain_step")
def plain_step_fixture() -> Any:
    return plain_step

"""Describes a `TrainConfig` and its batches to `gasp_fast.planning`: for the plan of a run and the MFU in its log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from gasp_fast.backbones import Backbone, unwrap
from gasp_fast.backbones.chat import IGNORE
from gasp_fast.backbones.frames import FRAMES_PER_GRID
from gasp_fast.backbones.liger import choose_liger
from gasp_fast.data.annotations.read import AnnotationReader
from gasp_fast.data.annotations.settings import SETTINGS_FILE
from gasp_fast.loss.matches import Matches
from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.flops import model_flops
from gasp_fast.planning.gpus import GPU, device_memory
from gasp_fast.planning.memory import most_kept_layers
from gasp_fast.planning.plan import PAPER_SEQUENCES, Plan, make_plan
from gasp_fast.planning.readings import Reading, readings
from gasp_fast.planning.shapes import PATCHES, ModelShape, shape_from_model
from gasp_fast.planning.training_setup import (
    SequenceMix,
    SequenceSize,
    Sharding,
    TrainingSetup,
    longest_sequence,
)
from gasp_fast.supervision.heads import HeadsConfig, parse_layers

from .config import TrainConfig
from .distributed import read_deepspeed
from .sources import QAConfig, ScenesConfig

if TYPE_CHECKING:
    from .model import SupervisedModel


def training_setup(config: TrainConfig, shape: ModelShape) -> TrainingSetup:
    """What `config` trains on a model of this shape, and how. auto recomputes all layers until memory is known."""
    heads = config.heads
    head_sizes, live_sizes, comparisons = supervised_sizes(heads, shape)
    head_precision, embedding_precision = heads.precisions(config.model.dtype)
    return TrainingSetup(
        shape=shape,
        adapter_rank=config.lora.rank if config.train.mode == "lora" else None,
        supervised_layers=len(parse_layers(heads.layers, shape.layers)) if config.loss.geometric else 0,
        head_sizes=head_sizes,
        live_sizes=live_sizes,
        comparisons=comparisons,
        head_precision=head_precision,
        embedding_precision=embedding_precision,
        precision=config.model.dtype,
        heads_only=config.train.mode == "heads",
        # A frozen model keeps no activations, so there is nothing to recompute.
        kept_layers=shape.layers if config.train.mode == "heads" else len(config.train.kept_layers(shape.layers)),
        fused_layers=config.model.liger is not False,
        batch_size=config.train.batch_size,
        micro_batch_size=config.train.micro_batch_size or 1,
        tokens_at_once=config.train.tokens_at_once,
        packing=config.train.packing,
        sharding=Sharding.of(read_deepspeed(config.deepspeed)),
    )


def supervised_sizes(heads: HeadsConfig, shape: ModelShape) -> tuple[tuple[int, int], tuple[int, int], int]:
    """`head_sizes`, `live_sizes` and `comparisons` of a `TrainingSetup`."""
    out = heads.out_size or (shape.query_width if heads.init == "svd" else shape.hidden)
    own = (heads.mid_size or shape.hidden // 2, out) if heads.own else (0, 0)
    query, key, groups = shape.query_width, shape.key_width, shape.key_width // shape.head_dim
    if heads.live is None:
        return own, (0, 0), 1
    if heads.live == "tied":
        return own, (query, query), 1
    if heads.attention_heads == "groups":
        return own, (query + key, key), heads.own + groups
    return own, (query + key, query if query == key else shape.head_dim), heads.own + 1


def keep_fitting_layers(
    config: TrainConfig, setup: TrainingSetup, mix: SequenceMix, gpus: int, memory: float, assumptions: Assumptions
) -> TrainingSetup:
    """`setup`, where `train.checkpointing` is auto with as many layers kept as fit `memory` (bytes of a GPU)."""
    if config.train.checkpointing != "auto" or setup.heads_only:
        return setup
    return replace(setup, kept_layers=most_kept_layers(setup, longest_sequence(mix), gpus, memory, assumptions))


def setup_here(config: TrainConfig, shape: ModelShape, backbone: Backbone, device: torch.device) -> TrainingSetup:
    """`training_setup` on this device, with the choices that depend on it. All processes must call.

    On a CPU, auto keeps the activations of all layers: the models that are trained there are small.
    """
    setup, auto = training_setup(config, shape), config.train.checkpointing == "auto"
    setup = replace(setup, fused_layers=choose_liger(config.model.liger, backbone, device))
    if device.type != "cuda":
        return replace(setup, kept_layers=shape.layers) if auto else setup
    memory, gpus = device_memory(device), 1
    if dist.is_initialized():  # ZeRO-3 gathers weights from all, so that all must recompute the same layers
        least, gpus = torch.tensor(memory, dtype=torch.float64, device=device), dist.get_world_size()
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        memory = float(least)
    return keep_fitting_layers(config, setup, expected_mix(config, shape), gpus, memory, Assumptions())


def expected_mix(config: TrainConfig, shape: ModelShape) -> SequenceMix:
    """The sequences that a run draws, as far as its configuration tells."""
    assumptions = Assumptions()
    return sequence_mix(config, frame_tokens_of(config, shape, assumptions), assumptions)


# ---- the plan of a run ----------------------------------------------------------------------------------------------


def plan_run(
    config: TrainConfig,
    shape: ModelShape,
    gpus: int,
    gpu: GPU,
    assumptions: Assumptions | None = None,
    frame_tokens: int | None = None,
    sequences: int | None = None,
) -> Plan:
    """The plan of a run. `frame_tokens` and `sequences` (of an epoch of the first source) override the recipe's."""
    assumptions = Assumptions() if assumptions is None else assumptions
    mix = sequence_mix(config, frame_tokens or frame_tokens_of(config, shape, assumptions), assumptions)
    steps = config.train.steps
    if steps is None:
        first = sequences or known_epoch(config) or PAPER_SEQUENCES
        steps = config.train.steps_of(config.data.epoch(dict.fromkeys(config.data.counted, first)))
    setup = keep_fitting_layers(config, training_setup(config, shape), mix, gpus, gpu.memory, assumptions)
    return make_plan(setup, mix, steps, gpus, gpu, assumptions)


def plans_of_readings(
    config: TrainConfig, shape: ModelShape, gpus: int, gpu: GPU, assumptions: Assumptions, frame_tokens: int | None
) -> list[tuple[Reading, Plan]]:
    """The plan of the recipe by each reading of the paper's totals; none where an epoch is not scenes and questions."""
    data, train = config.data, config.train
    if not {"scenes", "qa"} <= data.counted.keys() or train.steps is not None:
        return []
    scenes, counts = data.scenes, range(data.scenes.sequences.min_frames, data.scenes.sequences.max_frames + 1)
    tracks = tracks_of(scenes)
    seen = [assumptions.visible * frames for frames in counts]  # frames in which a track is seen
    pairs = tracks * sum(frames * (frames - 1) for frames in seen) / len(counts)
    plans = []
    for reading in readings(train.epochs, len(scenes.grids), sum(counts) / len(counts), tracks, pairs):
        mixed = replace(data, qa=replace(data.qa, weight=scenes.weight * reading.questions / reading.sequences))
        fixed = replace(train, steps=reading.steps(train.epochs, train.batch_size))
        read = replace(config, data=mixed, train=fixed)
        plans.append((reading, plan_run(read, shape, gpus, gpu, assumptions, frame_tokens)))
    return plans


def sequence_mix(config: TrainConfig, frame_tokens: int, assumptions: Assumptions) -> SequenceMix:
    """The sequences that a run draws: one size for each number of frames of each source."""
    sources = config.data.used.values()
    total = sum(source.weight for source in sources)
    mix: SequenceMix = []
    for source in sources:
        counts = frame_counts(config, source)
        for frames in counts:
            size = _size(config, source, frames, frame_tokens, assumptions)
            mix.append((source.weight / total / len(counts), size))
    return mix


def frame_counts(config: TrainConfig, source: ScenesConfig | QAConfig) -> Sequence[int]:
    """The numbers of frames of a source's sequences, all equally likely; of a question about a sequence, its own."""
    if isinstance(source, QAConfig) and source.frames is not None:
        return [source.frames]
    sequences = config.data.scenes.sequences
    return range(sequences.min_frames, sequences.max_frames + 1)


def _size(
    config: TrainConfig, source: ScenesConfig | QAConfig, frames: int, frame_tokens: int, assumptions: Assumptions
) -> SequenceSize:
    """The size of a sequence of so many frames. What the model merges into one grid of tokens counts as one."""
    frames = config.model.grids_of(frames)
    visual = frames * frame_tokens
    if isinstance(source, QAConfig):
        tokens = visual + assumptions.qa_tokens
        return SequenceSize(frames=frames, tokens=tokens, visual=visual, labelled=assumptions.labelled)
    tracked = config.loss.geometric
    return SequenceSize(
        frames=frames,
        tokens=visual + assumptions.prompt_tokens,
        visual=visual,
        tracked=visual if tracked else 0,
        anchors=anchors_of(config, frames, frame_tokens, assumptions) if tracked else 0,
    )


def anchors_of(config: TrainConfig, frames: int, frame_tokens: int, assumptions: Assumptions) -> int:
    """Unique anchor tokens of a sequence: no more than there are points, and no more than there are tokens."""
    tracks = tracks_of(config.data.scenes)
    if config.data.collator.anchors == "first":
        return min(tracks, frame_tokens)
    per_frame = min(tracks * FRAMES_PER_GRID[config.model.frames_as], frame_tokens)  # of all frames that share a grid
    return min(frames * frame_tokens, round(per_frame * frames * assumptions.visible))


def tracks_of(scenes: ScenesConfig) -> int:
    """Tracks of a sequence, of all grids."""
    return sum(round(scenes.keep * grid * grid) for grid in scenes.grids)


def frame_tokens_of(config: TrainConfig, shape: ModelShape, assumptions: Assumptions) -> int:
    """Visual tokens of a frame."""
    if shape.frame_tokens is not None:
        return shape.frame_tokens
    width, height = assumptions.source_frame
    pixels = min(config.model.frame_pixels or width * height, width * height)
    return max(1, pixels // (PATCHES * shape.patch**2))


def known_epoch(config: TrainConfig) -> int | None:
    """Samples of an epoch of the first counted source: of annotations on this machine, or a limit of questions."""
    first = next(iter(config.data.counted.values()))
    if isinstance(first, QAConfig):
        return first.limit
    if first.annotations and (Path(first.annotations[0]) / SETTINGS_FILE).is_file():
        return len(AnnotationReader(Path(first.annotations[0])).settings.sampler)
    return None


# ---- batches --------------------------------------------------------------------------------------------------------


class BatchFlops:
    """Model FLOPs of a forward and backward pass over a collator's batch. Made before the model is sharded."""

    def __init__(self, config: TrainConfig, model: SupervisedModel) -> None:
        self.setup = training_setup(config, shape_from_model(unwrap(model.model)))
        self.visual_token_id = model.backbone.visual_token_id

    def __call__(self, batch: dict[str, Any]) -> float:
        return model_flops(self.setup, self.sizes(batch))

    def sizes(self, batch: dict[str, Any]) -> list[SequenceSize]:
        """The sizes of the sequences of a batch on the CPU, padding included.

        The sizes of tracks are assigned to the first sequences, whichever they belong to: the count of a batch is a sum
        over its sequences.
        """
        row, padded = batch["token_index"].row, batch["input_ids"].shape  # [B, S]
        lengths = [padded[1]] * padded[0] if row is None else row.lengths
        visual = (batch["input_ids"] == self.visual_token_id).flatten().split(lengths)
        labelled = (batch["labels"] != IGNORE).flatten().split(lengths)
        frames = self._frames(visual, batch["token_index"].on_host.get("video_grid_thw"))
        tracked = [*_tracked(batch["matches"])]
        tracked += [(0, 0)] * (len(lengths) - len(tracked))
        return [
            SequenceSize(
                frames=frames[number],
                tokens=length,
                visual=int(visual[number].sum()),
                tracked=tracked[number][0],
                anchors=tracked[number][1],
                labelled=int(labelled[number].sum()),
            )
            for number, length in enumerate(lengths)
        ]

    def _frames(self, visual: Sequence[Tensor], videos: Tensor | None) -> list[int]:
        """Token grids of each sequence, whose tokens `visual [S]` are visual.

        Where they have no fixed number of tokens, images are counted by the text between them. `videos [videos, 3]` are
        the times, rows and columns of the sequences with frames, where frames are a video.
        """
        fixed = self.setup.shape.frame_tokens
        if fixed:
            return [int(tokens.sum()) // fixed for tokens in visual]
        if videos is None:
            return [int((tokens & ~tokens.roll(1)).sum()) for tokens in visual]
        times = iter(videos[:, 0].tolist())
        return [next(times) if tokens.any() else 0 for tokens in visual]


def _tracked(matches: Matches) -> Iterator[tuple[int, int]]:
    """Tokens and unique anchors of each sequence with tracks."""
    yield from ((span.token_count, span.row_count) for span in matches.index.rows.sequences)

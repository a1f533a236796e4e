"""`--dry-run`: what a run would train, and what its first step takes. Leaves no file."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from gasp_fast.backbones import unwrap
from gasp_fast.backbones.base_model import describe_layers
from gasp_fast.backbones.liger import choose_liger
from gasp_fast.planning.assumptions import Assumptions
from gasp_fast.planning.gpus import device_memory
from gasp_fast.planning.memory import memory_by_purpose, state_bytes
from gasp_fast.planning.shapes import shape_from_model
from gasp_fast.planning.training_setup import TrainingSetup, longest_sequence

from .config import TrainConfig
from .distributed import Processes
from .log import in_words
from .loop import TrainingLoop
from .model import SupervisedModel
from .optim import trained_groups
from .stream import Share
from .workload import expected_mix, training_setup


def describe(config: TrainConfig, model: SupervisedModel, share: Share, processes: Processes) -> str:
    """What is trained, how a step is divided, and the memory of its state. Call it before the model is sharded."""
    lines = [f"{'group':<10} {'parameters':>15} {'learning rate':>14}"]
    for group in trained_groups(model):
        rate = config.train.learning_rate * (config.train.head_lr_scale if group.name == "heads" else 1)
        lines.append(f"{group.name:<10} {group.count:>15,} {rate:>14g}")
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    lines.append(f"{'frozen':<10} {frozen:>15,} {'-':>14}")
    setup = training_setup(config, shape_from_model(unwrap(model.model)))
    at_once = f"{share.micro_batch_size or 1} at once, {share.accumulation} times on each"
    if share.tokens_at_once is not None:
        at_once = f"at most {share.tokens_at_once:,} tokens at once"
    if config.train.packing:
        at_once += ", packed into one row"
    lines.append(
        f"{share.world_size} process{'es' if share.world_size > 1 else ''}, ZeRO-{setup.sharding.stage}, "
        f"{describe_layers(config.model, model.backbone, processes.device)}; a step is {share.batch_size} sequences: "
        f"{at_once}"
    )
    memory = sum(state_bytes(setup, share.world_size).values()) / 1e9
    lines.append(f"weights, gradients, optimiser: {memory:.2f} GB a process; activations come on top")
    lines.append(describe_memory(config, model, setup, processes))
    return "\n".join(lines)


def describe_memory(config: TrainConfig, model: SupervisedModel, setup: TrainingSetup, processes: Processes) -> str:
    """How many decoder layers keep their activations; on a GPU, also the memory that this is estimated to take."""
    layers: Any = model.backbone.decoder_layers(model.model)
    kept = sum(not layer.gradient_checkpointing for layer in layers)
    words = f"keeps activations of {kept} of {len(layers)} decoder layers"
    if processes.device.type != "cuda":
        return words
    fused = choose_liger(config.model.liger, model.backbone, processes.device)
    setup = replace(setup, kept_layers=kept, fused_layers=fused)
    longest = longest_sequence(expected_mix(config, setup.shape))
    needed = sum(memory_by_purpose(setup, longest, processes.world_size, Assumptions()).values())
    return f"{words}: {needed / 1e9:.0f} of {device_memory(processes.device) / 1e9:.0f} GB, by estimate"


def try_step(loop: TrainingLoop) -> None:
    """Take one step and print its losses, its time and its memory."""
    start = time.perf_counter()
    record = loop.try_step()
    seconds = time.perf_counter() - start
    if loop.processes.first:
        memory = record["peak_memory"] / 1e9
        print(f"one step: {in_words(record)}")
        print(f"          {seconds:.1f} s with all that a first step prepares, at most {memory:.2f} GB a process")
        hours = seconds * loop.steps / 3600
        print(f"the run:  {loop.steps:,} steps, at most {hours:.1f} h at this rate (later steps are faster)")

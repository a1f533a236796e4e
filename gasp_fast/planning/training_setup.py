"""What is trained, how, and on sequences of which size. Every estimate in this folder is a function of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gasp_fast.supervision.heads import by_coordinates, coordinates_width

from .shapes import ModelShape
from .step_design import StepDesign


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """What ZeRO divides among GPUs, and what it moves to the CPU."""

    stage: int = 0
    deepspeed: bool = False
    optimiser_on_cpu: bool = False
    weights_on_cpu: bool = False

    @staticmethod
    def of(deepspeed: dict[str, Any] | None) -> Sharding:
        """From a DeepSpeed configuration; None is plain PyTorch."""
        if deepspeed is None:
            return Sharding()
        zero = deepspeed.get("zero_optimization", {})
        return Sharding(
            stage=int(zero.get("stage", 0)),
            deepspeed=True,
            optimiser_on_cpu=zero.get("offload_optimizer", {}).get("device") == "cpu",
            weights_on_cpu=zero.get("offload_param", {}).get("device") == "cpu",
        )


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters by kind; all but the frozen ones are trained."""

    frozen: int
    model: int
    adapters: int
    heads: int

    @property
    def trained(self) -> int:
        return self.model + self.adapters + self.heads


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """What is trained, and how."""

    shape: ModelShape
    adapter_rank: int | None  # None: there are no adapters
    heads_only: bool = False  # the model is frozen; without this and without adapters, its own weights are trained
    supervised_layers: int  # 0 without the geometric loss
    head_sizes: tuple[int, int]  # outputs of the two linear layers of a layer's correspondence head; 0 without
    live_sizes: tuple[int, int] = (0, 0)  # outputs of a layer's own projections that run again; of these, compared
    comparisons: int = 1  # of all anchors with all candidates, in a layer
    head_precision: Literal["fp32", "tf32", "bf16"]  # of the products in heads
    embedding_precision: Literal["fp32", "bf16"]  # of the products in the geometric loss
    precision: Literal["fp32", "bf16"]  # of the model's products, and of frozen weights
    kept_layers: int  # decoder layers that keep their activations until backward; the others are recomputed
    fused_layers: bool = False  # Liger's norms and MLPs in the decoder
    batch_size: int  # sequences of an optimiser step, over all GPUs
    micro_batch_size: int = 1  # sequences that a GPU takes at once
    tokens_at_once: int | None = None  # most tokens that it takes at once, in place of a number of sequences
    packing: bool = False  # what it takes at once is not padded
    sharding: Sharding = Sharding()
    design: StepDesign = field(default_factory=StepDesign)

    @property
    def full(self) -> bool:
        return self.adapter_rank is None and not self.heads_only

    @property
    def checkpointing(self) -> bool:
        return self.kept_layers < self.shape.layers

    @property
    def recomputed(self) -> float:
        """Share of the decoder layers that run forward once more in backward."""
        return 1 - self.kept_layers / self.shape.layers

    @property
    def element_bytes(self) -> int:
        return 2 if self.precision == "bf16" else 4

    @property
    def adapter_weights(self) -> int:
        """Of one decoder layer."""
        return 0 if self.adapter_rank is None else self.shape.adapter_weights(self.adapter_rank)

    @property
    def head_weights(self) -> int:
        """Of the two matrices of one correspondence head."""
        middle, out = self.head_sizes
        return middle * (self.shape.hidden + out)

    @property
    def coordinates(self) -> int:
        """Width of the coordinates that the loss compares in place of a head's embeddings; 0: it compares these."""
        middle, out = self.head_sizes
        used = self.design.coordinates and by_coordinates(middle, out, self.head_precision, self.embedding_precision)
        return coordinates_width(middle) if used else 0

    @property
    def head_products(self) -> int:
        """Operations of a token in the products of one correspondence head, by two."""
        return self.head_sizes[0] * self.shape.hidden if self.coordinates else self.head_weights

    @property
    def compared(self) -> int:
        """Width of what the loss compares of a correspondence head."""
        return self.coordinates or self.head_sizes[1]

    @property
    def parameters(self) -> ParameterCounts:
        base = self.shape.language_parameters + self.shape.vision_parameters
        return ParameterCounts(
            frozen=0 if self.full else base,
            model=base if self.full else 0,
            adapters=self.adapter_weights * self.shape.layers,
            heads=self.supervised_layers * (self.head_weights + sum(self.head_sizes)),
        )

    def accumulation(self, gpus: int) -> int:
        """Micro-batches of a GPU in a step, where they have a fixed size."""
        return micro_batches(self.batch_size, self.micro_batch_size, gpus)

    def at_once(self, longest: SequenceSize) -> float:
        """How many of the longest sequences a GPU takes at once, measured by their tokens."""
        return self.micro_batch_size if self.tokens_at_once is None else max(1, self.tokens_at_once / longest.tokens)


def micro_batches(batch_size: int, micro_batch_size: int, processes: int) -> int:
    """Micro-batches of each process in an optimiser step."""
    at_once = processes * micro_batch_size
    if batch_size % at_once:
        raise ValueError(
            f"train.batch_size = {batch_size} does not divide over {processes} processes (one a GPU) with "
            f"train.micro_batch_size = {micro_batch_size}; use a multiple of {at_once}, or train.tokens_at_once"
        )
    return batch_size // at_once


@dataclass(frozen=True, kw_only=True)
class SequenceSize:
    """How much of everything one sequence has."""

    frames: int
    tokens: int  # S, text and visual
    visual: int  # N, visual tokens
    tracked: int = 0  # N again, or 0 without tracks
    anchors: int = 0  # A, visual tokens that are anchors of matches
    labelled: int = 0  # tokens that the language loss counts
    most_tokens: int | None = None  # upper bound, where `tokens` is predicted


SequenceMix = list[tuple[float, SequenceSize]]  # the sizes that a run draws, each with its probability


def longest_sequence(mix: SequenceMix) -> SequenceSize:
    return max((size for _, size in mix), key=lambda size: size.tokens)

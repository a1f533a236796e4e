"""What the estimate of a run assumes: every number that is neither counted nor stated by a vendor.

Efficiencies are those of one H200, from the files in benchmarks/results/ that are named beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Efficiencies and properties of the data. A measured step corrects the seconds of parts (`calibration.py`)."""

    # Shares of the peak rate that products reach.
    products: float = 0.78  # decoder, adapters, vision tower: "decoder" in h200-2026-11-26/step-a.json, step-b.json
    unaligned: float = 0.25  # of a width that is no multiple of 8: cutlass kernels in qwen-vision-tower.log there
    attention: float = 0.48  # step-a.json; cuDNN's
    heads: float = 0.68  # step-b.json, tf32 and bf16
    loss: float = 0.70  # `floor_tflops` of h200-2026-11-26-blocks/ours-w1.json
    loss_fp32: float = 0.92  # step-a.json
    # Shares of the stated bandwidth of the GPU's memory.
    bandwidth: float = 0.43  # between products of the decoder: "norms, activations" in step-a.json, step-b.json
    operands: float = 0.75  # of products with few FLOPs a byte: "adapters" there
    vision: float = 0.60  # between products of the vision tower: the other kernels in qwen-vision-tower.log
    optimiser: float = 0.66  # step-a.json
    # Other time.
    operation: float = (
        33e-6  # seconds of the host for an operation, its backward included: LLaVA's cases in step-b.json
    )
    link: float = 0.70  # share of the bandwidth between GPUs
    exposed: float = 0.30  # share of communication that does not overlap with computation
    cpu_bandwidth: float = 40e9  # bytes a second of the host's memory for each GPU, for an offloaded optimiser
    factors: Mapping[str, float] = field(default_factory=dict)  # measured over estimated seconds, by part of a step
    # Data.
    visible: float = 0.6  # share of all (track, frame) pairs
    prompt_tokens: int = 64  # text of a sequence of a scene
    qa_tokens: int = 256  # text of questions and answers
    labelled: int = 128  # of those
    source_frame: tuple[int, int] = (960, 540)  # pixels of a scene's frame, where nothing else limits its size
    # Memory.
    reserve: float = 3 * GIB  # bytes: context, communication buffers, kernels
    fragmentation: float = 0.05  # of everything else
    margin: float = 0.1  # share of a GPU that `checkpointing: auto` leaves free, since this estimate may be too low

"""What the estimate of a run assumes: every number that is neither counted nor stated by a vendor."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Efficiencies and properties of the data. `calibration.py` replaces the efficiencies by measured ones."""

    # Efficiencies: shares of the peak rate that products reach.
    decoder: float = 0.60
    attention: float = 0.45
    adapters: float = 0.60
    vision: float = 0.35  # small matrices, attention in windows
    heads: float = 0.50
    loss: float = 0.50
    # Shares of the stated bandwidth.
    bandwidth: float = 0.70  # of the GPU's memory, in norms, activations, rotations
    optimiser: float = 0.70  # of the GPU's memory, in AdamW
    link: float = 0.70  # between GPUs
    # Other time.
    idle: float = 0.0  # share of the computing time that a GPU waits for its host, on top
    exposed: float = 0.30  # share of communication that does not overlap with computation
    cpu_bandwidth: float = 40e9  # bytes a second of the host's memory for each GPU, for an offloaded optimiser
    # Data.
    visible: float = 0.6  # share of all (track, frame) pairs
    prompt_tokens: int = 64  # text of a sequence of a scene
    qa_tokens: int = 256  # text of questions and answers
    labelled: int = 128  # of those
    source_frame: tuple[int, int] = (960, 540)  # pixels of a scene's frame, where nothing else limits its size
    # Memory.
    reserve: float = 3 * GIB  # bytes: context, communication buffers, kernels
    fragmentation: float = 0.05  # of everything else

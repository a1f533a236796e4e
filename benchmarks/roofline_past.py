"""The design of commit f722f58, which was measured as a whole: the model must reproduce its times.

A chunk had as many whole rows as fitted the workspace; there was one similarity product, one row pass and two gradient
products a chunk. The trials replaced both row kernels, and tried larger workspaces.
"""

from __future__ import annotations

import math

import roofline_model as model
from roofline_model import H200, Constants

# Milliseconds of the host for a chunk and for a group of layers: solved from the host's times for w2 and w3 (`profile`
# in loss-and-peers.json), which have 32 and 56 chunks in 32 and 28 groups.
HOST_CHUNK, HOST_GROUP = 0.565, 0.208
CHUNK_KERNELS, GROUP_KERNELS = 13, 4
FRAMES = {"w1": 24, "w2": 16, "w3": 16, "w5": 2}
# Workspaces in MiB of the measured runs, and the row kernels: statistics, gradient.
COMMIT = "frame_statistics", "similarity_gradient"
TRIAL = "trial statistics", "trial gradient"
RUNS = {"as is": (112, COMMIT), "lean 240": (240, TRIAL), "lean 480": (480, TRIAL), "lean 1000": (1000, TRIAL)}


def compared(constants: Constants) -> dict[str, dict[str, float]]:
    """Ratio to three products, modelled and measured, of each workload and run."""
    floors = model.measured_floors()
    checks = {}
    for name, run, milliseconds, *_ in model.read(model.MEASURED / "gemm-and-trials.json")["trial"]:
        if run in RUNS and name in FRAMES:
            floor = floors[name][1]
            modelled, measured = past_time(constants, name, *RUNS[run]) / floor, milliseconds * 1e-3 / floor
            checks[f"{name} {run}"] = {"model": modelled, "measured": measured, "error": modelled / measured - 1}
    return checks


def past_time(constants: Constants, name: str, workspace: int, kernels: tuple[str, str]) -> float:
    """Seconds of forward and backward."""
    shape = layers, anchors, tokens, width = model.workload_shape(name)
    correction = model.measured_floors()[name][1] / model.floor_time(constants.product, H200, *shape, products=3)
    together, rows = past_blocks(name, workspace)
    groups, chunks = math.ceil(layers / together), math.ceil(anchors / rows)
    busy = 0.0
    for chunk in range(chunks):
        count = min(rows, anchors - chunk * rows)
        busy += correction * _products(constants, together, count, tokens, width, later=chunk > 0)
        busy += _row_passes(constants, together, count, tokens, FRAMES[name], kernels)
        busy += model.torch_time(constants.torch, H200, 4.0 * together * count * width, scattered=False)
        busy += model.torch_time(constants.torch, H200, 12.0 * together * count * width, scattered=True)
        busy += CHUNK_KERNELS * constants.pause.gap * 1e-6
    busy = groups * (busy + _norms(constants, together, tokens, width) + GROUP_KERNELS * constants.pause.gap * 1e-6)
    host = 1e-3 * groups * (HOST_GROUP + chunks * HOST_CHUNK)
    scale = model.torch_time(constants.torch, H200, 4.0 * layers * tokens * width, scattered=True)
    pause = 1e-3 * constants.pause.call
    return max(busy, host) + scale + pause  # scaled by the upstream gradient at the end


def past_blocks(name: str, workspace: int) -> tuple[int, int]:
    """(layers together, rows of a chunk)."""
    layers, anchors, tokens, width = model.workload_shape(name)
    row = 6 * tokens + 8 * width  # bytes: similarities and X, anchors and row gradients
    together = min(layers, max(1, (workspace << 20) // (anchors * row + 4 * tokens * width)))
    fitting = max(1, (workspace << 20) // (together * row))
    return together, math.ceil(anchors / math.ceil(anchors / fitting))


def _products(constants: Constants, batch: int, rows: int, tokens: int, width: int, later: bool) -> float:
    shapes = [(rows, tokens, width, False), (rows, width, tokens, False), (tokens, width, rows, later)]
    return sum(
        model.product_time(constants.product, H200, m, n, k, 4, accumulate, batch) for m, n, k, accumulate in shapes
    )


def _row_passes(
    constants: Constants, batch: int, rows: int, tokens: int, frames: int, kernels: tuple[str, str]
) -> float:
    codes, total, cells = model.recorded_codes(), 0.0, batch * rows * tokens
    for kernel, moved in zip(kernels, (4, 6), strict=True):
        code = codes[kernel]
        programs, passes = batch * math.ceil(rows / code.rows) * frames, math.ceil(tokens / frames / code.columns)
        total += model.row_time(constants.row, H200, programs, passes, code, cells * moved)
    return total


def _norms(constants: Constants, batch: int, tokens: int, width: int) -> float:
    codes, total, numbers = model.recorded_codes(), 0.0, batch * tokens * width
    for kernel, moved in (("inverse_norms", 2), ("project_gradient", 8)):
        code = codes[kernel]
        programs, passes = batch * math.ceil(tokens / code.rows), code.passes * math.ceil(width / code.columns)
        total += model.row_time(constants.row, H200, programs, passes, code, numbers * moved)
    return total

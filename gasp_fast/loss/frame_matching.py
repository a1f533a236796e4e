"""`frame_match`: each query token against each frame of its sequence, without a similarity matrix.

Evaluation is built on it; the loss uses the same kernels. The values may be depths, coordinates or any small vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gasp_fast.kernels.engines import choose_backend
from gasp_fast.kernels.index import RowIndex

from .arguments import (
    FLOATS,
    check_indices,
    check_offsets,
    check_workspace,
    checked_embeddings,
    checked_keys,
    checked_temperature,
    layer_stack,
)
from .autograd import FrameMatching, refuse_transforms
from .config import LossConfig
from .dense import dense_frame_match
from .metric import InMetric


@dataclass(frozen=True)
class FrameMatch:
    """For each layer, query and frame of the query's sequence. `P` = frames of the longest sequence.

    Where a sequence has fewer frames, and in frames without tokens: `lse = -inf`, `expected = 0`, `best = -1`.
    """

    lse: Tensor  # [L, A, P], log-sum-exp of the similarities; differentiable
    expected: Tensor  # [L, A, P, V], expected values under the softmax; differentiable
    best: Tensor  # int64 [L, A, P], the most similar token (index in the batch), the first of equals
    peak: Tensor  # [L, A, P], its similarity divided by the temperature
    backend: str

    @property
    def confidence(self) -> Tensor:
        """[L, A, P], the probability of the best token within its frame; 0 in a frame without tokens."""
        return torch.where(self.best < 0, 0.0, (self.peak - self.lse.detach()).exp())


def frame_match(
    embeddings: Tensor | Sequence[Tensor],  # [L, N, D], [N, D], or L tensors [N, D]
    anchors: Tensor,  # int64 [A], query tokens, in any order, repeats allowed
    frame_offsets: Tensor,  # int64 [F + 1]
    *,
    values: Tensor | None = None,  # float [N] or [N, V]: a small vector per token
    known: Tensor | None = None,  # bool [N]: expected values are taken over these tokens only
    sequence_offsets: Tensor | None = None,  # int64 [B + 1], frame range of each sequence; None = one sequence
    temperature: float | Tensor = LossConfig.temperature,
    exclude_anchor: bool = False,  # leave a query out of its own frame
    backend: str = "auto",
    keys: Tensor | Sequence[Tensor] | None = None,  # like embeddings: the candidates; None = the embeddings
    workspace: int | None = None,  # MiB of scratch memory; see `gasp_loss`
) -> FrameMatch:
    """One pass over the tokens of every frame: log-sum-exp, expected values and arg-max of each query.

    Similarities are cosines over temperature. `anchors` and the offsets are read on the host: keep them on the CPU when
    the embeddings are on a GPU, and nothing waits for the device.
    """
    if isinstance(embeddings, InMetric):
        raise TypeError("embeddings is what in_metric returned, and only gasp_loss takes that; pass the vectors")
    layers = checked_embeddings(embeddings)
    key_layers = checked_keys(keys, layers)
    check_workspace(workspace)
    device = layers[0].device
    tau = checked_temperature(temperature, layers[0])
    rows, order = _row_index(anchors, frame_offsets, sequence_offsets, layers[0].shape[-2])
    rows, order = rows.to(device, non_blocking=True), order.to(device, non_blocking=True)
    table, mask = _value_table(values, known, layers[0])
    chosen = choose_backend(backend, device, layers[0].dtype)
    if chosen == "torch":
        stack = layer_stack(layers)
        key_stack = layer_stack(key_layers) if key_layers else stack
        lse, expected, best, peak, _ = dense_frame_match(stack, key_stack, rows, tau, table, mask, exclude_anchor)
    else:
        refuse_transforms(chosen)
        table = None if table is None else table.float()
        lse, _, expected, best, peak = FrameMatching.apply(
            rows,
            rows.longest,
            table,
            mask,
            exclude_anchor,
            chosen,
            workspace,
            "keys" if key_layers else "",
            tau,
            *layers,
            *key_layers,
        )
    lse, expected, best, peak = (statistic[:, order] for statistic in (lse, expected, best, peak))
    return FrameMatch(lse, expected, best, peak, chosen)


def _row_index(
    anchors: Tensor, frame_offsets: Tensor, sequence_offsets: Tensor | None, tokens: int
) -> tuple[RowIndex, Tensor]:
    """Queries as ascending rows without repeats, and the row of each query."""
    check_offsets("frame_offsets", frame_offsets, "token", tokens, f"embeddings hold {tokens} tokens")
    frames = frame_offsets.shape[0] - 1
    if sequence_offsets is None:
        sequence_offsets = torch.tensor([0, frames])
    check_offsets("sequence_offsets", sequence_offsets, "frame", frames, f"frame_offsets holds {frames} frames")
    check_indices("anchors", anchors, tokens)
    row_token, order = torch.unique(anchors.cpu(), return_inverse=True)
    return RowIndex.build(row_token, frame_offsets.cpu(), sequence_offsets.cpu()), order


def _value_table(values: Tensor | None, known: Tensor | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Values as [N, V], zero where unknown, and float32 [N], 1 for a known token."""
    if known is not None and values is None:
        raise ValueError("known is given without values; it says which values count")
    if values is None:
        return None, None
    tokens, device = like.shape[-2], like.device
    for name, tensor, most in (("values", values, 2), ("known", known, 1)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; pass a torch tensor with one entry per token")
        if tensor is not None and not 1 <= tensor.dim() <= most:
            shapes = "[N] or [N, V]" if most == 2 else "[N]"
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {shapes}")
        if tensor is not None and tensor.shape[0] != tokens:
            raise ValueError(
                f"{name} has {tensor.shape[0]} entries, embeddings hold {tokens} tokens; one is needed each"
            )
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} lies on {tensor.device}, embeddings on {device}; move it there")
    if values.dtype not in FLOATS:
        raise TypeError(f"values has dtype {values.dtype}; it must be floating (use values.float())")
    if values.requires_grad:
        raise ValueError("values requires grad; expected values are differentiated in the embeddings only (detach it)")
    if known is not None and known.dtype != torch.bool:
        raise TypeError(f"known has dtype {known.dtype}; it must be bool")
    mask = torch.ones(tokens, dtype=torch.bool, device=device) if known is None else known
    table = values[:, None] if values.dim() == 1 else values
    return torch.where(mask[:, None], table, 0), mask.float()

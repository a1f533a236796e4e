"""Correspondence heads: map hidden states of a decoder layer to the embeddings that the loss compares.

A head is Linear -> GELU -> Linear (paper, App. B). Its weights are always fp32; the precision of its two matrix
products can be chosen (see `precision.py`), and an outer autocast does not override the choice. The type of the
embeddings is a choice of its own, because the products of the loss run in it: those of fp32 embeddings are IEEE fp32
and took six times as long on an H200 as those of bf16 ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gasp_fast.config.limits import check_whole

from .layer_capture import HeadInput
from .live_projections import AttentionHeads, HeadKind
from .precision import Compute, PrecisionLinear

LARGEST_SIZE = 65_536  # of the layers of a head: four times the width of the widest supported models
ALIGNED = 8  # numbers of two bytes: widths of which products load 16 bytes at once
WIDER = 1.5  # than its coordinates, at least, are embeddings in whose place the loss takes these
_PART = r"\s*\d{1,6}(-\d{1,6})?\s*"
LAYERS = re.compile(rf"all|{_PART}(,{_PART})*")


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """What is supervised of each decoder layer: by default, a correspondence head on its output."""

    layers: str = "all"  # or 18-25, 7, 1-4,25-28: counted from 1, both ends included
    kind: HeadKind = "correspondence"  # or the layer's own projections, live: tied, qk, or correspondence_and_qk
    attention_heads: AttentionHeads = "mean"  # of qk: mean of all heads, or a loss for each group that shares keys
    input: HeadInput = "output"  # what a head reads of its layer: output, output_normed or layer_input_normed
    init: Literal["svd", "random"] = "svd"  # svd: from the layer's own query projection
    bias: Literal["copy", "zero"] = "copy"  # of a head that starts as svd: the query projection's bias, or zero
    mid_size: int | None = None  # null: half of the hidden size
    out_size: int | None = None  # null: the hidden size (svd: the outputs of the query projection)
    compute: Literal["auto", "fp32", "tf32", "bf16"] = "auto"  # precision of the products; weights are fp32
    embeddings: Literal["auto", "fp32", "bf16"] = "auto"  # type of what the loss compares; auto: model.dtype, for both

    def __post_init__(self) -> None:
        if not LAYERS.fullmatch(self.layers):
            raise ValueError(
                f"heads.layers = {self.layers!r} is not understood; write all, a layer (7) or a range (18-25)"
            )
        check_whole(self, ("mid_size", "out_size"), "heads.", most=LARGEST_SIZE)
        if self.attention_heads != "mean" and self.live != "qk":
            raise ValueError(
                f"heads.attention_heads = {self.attention_heads} is about queries and keys, but heads.kind is "
                f"{self.kind}; set heads.kind=qk or correspondence_and_qk"
            )

    @property
    def own(self) -> bool:
        """Whether there are correspondence heads, with weights of their own."""
        return self.kind in ("correspondence", "correspondence_and_qk")

    @property
    def live(self) -> Literal["tied", "qk"] | None:
        """Which of the model's projections are supervised: see `live_projections.py`."""
        live: dict[str, Literal["tied", "qk"]] = {"tied": "tied", "qk": "qk", "correspondence_and_qk": "qk"}
        return live.get(self.kind)

    def precisions(self, dtype: Literal["fp32", "bf16"]) -> tuple[Compute, Literal["fp32", "bf16"]]:
        """Of the products, and of the embeddings, in a model that computes in `dtype`."""
        compute = dtype if self.compute == "auto" else self.compute
        return compute, dtype if self.embeddings == "auto" else self.embeddings


def coordinates_width(mid_size: int) -> int:
    """K of a head's coordinates: the inner width and one, rounded up to what products are fast at."""
    return -(-(mid_size + 1) // ALIGNED) * ALIGNED


def by_coordinates(mid_size: int, out_size: int, compute: str, embeddings: str) -> bool:
    """Whether the loss takes a head's coordinates and their metric in place of its embeddings: the same loss, and less
    work where these are wider. Only where both are bf16, as the products for it are."""
    return compute == embeddings == "bf16" and out_size >= WIDER * coordinates_width(mid_size)


def fewest_tokens(mid_size: int, out_size: int) -> float:
    """From how many tokens on coordinates save more than their metric costs: `D K^2` operations, against `K (D - K)` of
    each token in the head's second product. What the loss saves is not counted."""
    width = coordinates_width(mid_size)
    return out_size * width / (out_size - width)


class CorrespondenceHead(nn.Module):
    """Linear -> GELU -> Linear, `hidden_size -> mid_size -> out_size`.

    The defaults are those of the paper's App. B; the sizes of its main text (`d -> 2 d_emb -> d_emb`) are
    `CorrespondenceHead(d, mid_size=2 * d_emb, out_size=d_emb)`.
    """

    def __init__(
        self, hidden_size: int, mid_size: int | None = None, out_size: int | None = None, compute: Compute = "fp32"
    ) -> None:
        super().__init__()
        if compute not in get_args(Compute):
            raise ValueError(f"compute = {compute!r} is unknown; choose one of {', '.join(get_args(Compute))}")
        mid_size = hidden_size // 2 if mid_size is None else mid_size
        out_size = hidden_size if out_size is None else out_size
        for name, size in (("hidden_size", hidden_size), ("mid_size", mid_size), ("out_size", out_size)):
            if size < 1:
                raise ValueError(f"{name} = {size} must be at least 1")
        self.first = PrecisionLinear(hidden_size, mid_size, compute)
        self.second = PrecisionLinear(mid_size, out_size, compute)

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden [..., hidden_size]` of any float dtype -> raw (not normalised) embeddings `[..., out_size]`."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.second(F.gelu(self.first(hidden)))

    def coordinates(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`hidden [N, hidden_size]` to bf16 coordinates `[N, K]` of the embeddings, and the metric `[K, K]`.

        An embedding is `e = W h + b`, with `h` of the inner width, so all embeddings lie in a space of as many
        dimensions and one. A loss of cosines needs no more than their inner products (`gasp_fast.loss.metric`). With
        the mean `m` of all `h`,

            e = [W, b + W m] [h - m, 1]

        Products in 16 bits need the mean: trained embeddings point in all directions, so that `W m` nearly cancels
        `b`, and `h` by itself has inner products that are small differences of large ones. `m` is a constant here, and
        the gradients of `W` and `b` are those of `e`.
        """
        count, width = len(hidden), coordinates_width(self.second.in_features)
        with torch.autocast(hidden.device.type, enabled=False):
            h = F.gelu(self.first(hidden)).bfloat16()
            mean = h.detach().sum(0, dtype=torch.float32).div(max(1, count)).bfloat16()  # 0 without tokens, not NaN
            weight = self.second.weight.bfloat16()
            offset = self.second.bias.bfloat16() + weight @ mean  # [out]
            ones = width - h.shape[1]  # of which the first counts
            x = torch.cat([h - mean, h.new_ones(count, ones)], dim=1)
            factor = torch.cat([weight, offset[:, None], weight.new_zeros(len(weight), ones - 1)], dim=1)  # [out, K]
            return x, factor.mT @ factor

    @classmethod
    def from_query_projection(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        mid_size: int | None = None,
        out_size: int | None = None,
        compute: Compute = "fp32",
    ) -> CorrespondenceHead:
        """Initialise a head as the best approximation of a query projection `W_Q` of rank `mid_size`.

        With `W_Q = U S V^T` and `r = mid_size`, the first layer is `S_r^1/2 V_r^T` and the second `U_r S_r^1/2`, so
        that without the GELU the head is the best rank-`r` approximation of `W_Q` (Eckart-Young). `W_Q` is
        `[outputs, hidden_size]`; it need not be square (grouped or narrow query heads).

        Special cases:

        - A bias of the projection becomes the bias of the second layer; the first layer's bias is zero. Then
          `head(x) = W_r x + b`, again without the GELU.
        - `mid_size` above the rank of `W_Q`: the surplus columns of the second layer are zero, which keeps the product
          exact. The surplus rows of the first layer keep their random initialisation; if both were zero, neither would
          ever receive a gradient.
        - `out_size` below the outputs of `W_Q`: the embeddings are expressed in the leading `out_size` left singular
          directions (`U^T` applied to output and bias). Cosine similarity is invariant to the rotation, so a head
          without bias gives exactly the similarities of the best approximation of rank `min(mid_size, out_size)`.
        - Any other `out_size` above the outputs or above `hidden_size` raises `ValueError`: the surplus coordinates
          would be zero for every token, and such a coordinate receives no gradient from a similarity.

        `mid_size` defaults to half of hidden_size, `out_size` to the outputs of `W_Q`.
        """
        head = cls.sized_for(weight, bias, mid_size, out_size, compute)
        head.approximate(weight, bias)
        return head

    @classmethod
    def sized_for(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        mid_size: int | None = None,
        out_size: int | None = None,
        compute: Compute = "fp32",
    ) -> CorrespondenceHead:
        """A random head on the device and with the sizes of `from_query_projection`."""
        if weight.ndim != 2 or weight.numel() == 0:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}, expected [outputs, hidden_size]; "
                "a ZeRO-3 partitioned weight must be gathered first (deepspeed.zero.GatheredParameters)"
            )
        outputs, hidden_size = weight.shape
        if bias is not None and bias.shape != (outputs,):
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}, expected [{outputs}] for a weight of {outputs} outputs"
            )
        out_size = outputs if out_size is None else out_size
        if out_size != outputs and out_size > min(outputs, hidden_size):
            raise ValueError(
                f"out_size = {out_size} cannot be filled from a weight of {outputs} outputs and {hidden_size} inputs; "
                f"use {outputs}, or at most {min(outputs, hidden_size)}, or random weights: CorrespondenceHead(...)"
            )
        with torch.device(weight.device):
            return cls(hidden_size, mid_size, out_size, compute)

    @torch.no_grad()
    def approximate(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Set the weights of a head that `sized_for` made: see `from_query_projection`."""
        u, s, rows = leading_directions(weight)
        outputs, (out_size, mid_size) = len(weight), self.second.weight.shape
        out_bias = u.new_zeros(outputs) if bias is None else bias.double()
        if out_size < outputs:
            out_bias = u.mT[:out_size] @ out_bias
            u = torch.eye(out_size, len(s), dtype=u.dtype, device=u.device)  # the leading rows of U^T U
        numerical_rank = int((s > s[0] * torch.finfo(torch.float32).eps).sum())  # what fp32 weights can express
        rank = min(mid_size, numerical_rank)
        root = s[:rank].sqrt()
        self.first.weight[:rank] = (rows[:rank] / root[:, None]).float()
        self.first.bias.zero_()
        self.second.weight.zero_()
        self.second.weight[:, :rank] = (u[:, :rank] * root).float()
        self.second.bias.copy_(out_bias)


def leading_directions(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`U [outputs, k]`, `S [k]` and `S V^T [k, hidden_size]` of `W = U S V^T`, the largest singular values first.

    In float64, so that a head is exact up to the rounding of its fp32 weights. U holds the eigenvectors of `W W^T`,
    which take a fifth of an SVD's time on a GPU. Eigenvalues would give small singular values only to the root of the
    precision; here they are the norms of the rows of `U^T W`, and `U U^T W` is exact whatever the error of U's last
    columns. The largest number of each column of U is positive: libraries choose the sign as it happens.
    """
    weight = weight.detach().double()
    u = torch.linalg.eigh(weight @ weight.mT).eigenvectors.flip(1)[:, : min(weight.shape)]
    u = u * u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    rows = u.mT @ weight
    return u, torch.linalg.vector_norm(rows, dim=1), rows


class CorrespondenceHeads(nn.Module):
    """One head for each supervised decoder layer, addressed by the layer's index (0 is the first decoder layer).

    `reads` is what the heads were made to read of their layers: see `layer_capture.py`.
    """

    def __init__(self, heads: Mapping[int, CorrespondenceHead], reads: HeadInput = "output") -> None:
        super().__init__()
        if reads not in get_args(HeadInput):
            raise ValueError(f"reads = {reads!r} is unknown; choose one of {', '.join(get_args(HeadInput))}")
        if not heads:
            raise ValueError("heads is empty; supervise at least one decoder layer")
        self.by_layer = nn.ModuleDict({str(layer): heads[layer] for layer in sorted(heads)})
        self.reads = reads

    @classmethod
    def from_query_projections(
        cls,
        projections: Mapping[int, tuple[Tensor, Tensor | None]],
        mid_size: int | None = None,
        out_size: int | None = None,
        compute: Compute = "fp32",
    ) -> CorrespondenceHeads:
        """Heads for the given layers, each initialised from that layer's own (weight, bias) of W_Q."""
        return cls(
            {
                layer: CorrespondenceHead.from_query_projection(weight, bias, mid_size, out_size, compute)
                for layer, (weight, bias) in projections.items()
            }
        )

    @property
    def layers(self) -> list[int]:
        return [int(name) for name in self.by_layer]

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Embeddings `[..., out_size]` of what `reads` names of one layer, `[..., hidden_size]`."""
        if str(layer) not in self.by_layer:
            raise ValueError(f"layer = {layer} has no head; the supervised layers are {self.layers}")
        return self.by_layer[str(layer)](hidden)


def parse_layers(spec: str, count: int) -> list[int]:
    """Layer indices (from 0) of "all", "18-25", "7" or "1-4,25-28" in a model of `count` layers.

    The numbers of `spec` count from 1 and ranges include both ends, as in the paper, whose last range is 25-32 of 32.
    """
    if spec == "all":
        return list(range(count))
    chosen: set[int] = set()
    for part in spec.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()):
            raise ValueError(f"layers = {spec!r} is not understood; write all, a layer (7) or a range (18-25)")
        low, high = int(first), int(last)
        if not 1 <= low <= high <= count:
            raise ValueError(f"layers = {spec!r} does not fit a model of {count} layers; use 1-{count} or all")
        chosen.update(range(low - 1, high))
    return sorted(chosen)

"""`LiveProjections`: supervision of the queries and keys of the model itself, without weights of its own.

A decoder layer's attention projects the normed input of the layer to queries and keys. Supervision of the layer's
output teaches them nothing that the output does not ask for. Here the projections run once more, on the rows of tracked
tokens, with their adapters and without rotary embedding, and the loss compares what they make:

    tied   queries with queries, all heads side by side: what a correspondence head is at the beginning, but live
    qk     queries of anchors with keys of candidates, as attention compares them

Where the attention normalises queries and keys of each head, as in Qwen3-VL, so does this.

The weights are the model's. Their gradients are computed with those of the rows (`geometric.py`) and added to the ones
that reach them through the layer, so nothing depends on how the layer itself is checkpointed.

Queries have more heads than keys where keys are shared by groups of query heads. `mean` compares the mean of all query
heads with the mean of all key heads; where there are as many keys as queries, the heads are compared side by side, as
one long vector. `groups` compares each key head with the mean of the query heads that it serves, in a loss of its own;
the losses of the groups are averaged.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .layer_capture import HeadInput

HeadKind = Literal["correspondence", "tied", "qk", "correspondence_and_qk"]
AttentionHeads = Literal["mean", "groups"]


class Compared(NamedTuple):
    """What the loss compares of a layer, in `parts` losses."""

    embeddings: Tensor  # [parts, N, D], of anchors
    keys: Tensor | None = None  # [parts, N, D], of candidates; None: the same
    metric: Tensor | None = None  # [parts, D, D], of their inner products; None: the usual one


class LiveProjections(nn.Module):
    """What is compared of one decoder layer. Has no parameters: `weights` are the model's."""

    reads: HeadInput = "layer_input_normed"

    def __init__(
        self,
        layer: int,
        attention: nn.Module,  # with linear layers q_proj and k_proj, and norms q_norm and k_norm or none
        head_dim: int,
        kind: Literal["tied", "qk"],
        heads: AttentionHeads = "mean",
        embeddings: torch.dtype | None = None,  # the type in which the loss compares them; None: as they are
    ) -> None:
        super().__init__()
        self.layer, self.head_dim, self.kind, self.heads, self.embeddings = layer, head_dim, kind, heads, embeddings
        model: Any = attention
        # In tuples, where torch does not see them: a module registered here as well would be saved twice.
        self._projections: tuple[Any, ...] = (model.q_proj,) if kind == "tied" else (model.q_proj, model.k_proj)
        self._norms = tuple(head_norm(attention, name, head_dim) for name in ("q_norm", "k_norm"))

    @property
    def width(self) -> int:
        """Of all that is projected."""
        return sum(projection.out_features for projection in self._projections)

    @property
    def sizes(self) -> tuple[int, int]:
        """Only layers of the same sizes share a call of the loss."""
        return self.width, self.parts

    @property
    def parts(self) -> int:
        """Losses of which the layer's is the mean."""
        groups = self.kind == "qk" and self.heads == "groups"
        return self._projections[1].out_features // self.head_dim if groups else 1

    def weights(self) -> list[nn.Parameter]:
        norms = [norm for norm in self._norms[: len(self._projections)] if norm is not None]
        return [weight for module in (*self._projections, *norms) for weight in module.parameters()]

    def forward(self, rows: Tensor) -> Compared:
        """Rows [N, hidden] to what is compared of them."""
        projected = [projection(rows) for projection in self._projections]  # [N, heads * head_dim] each
        projected = [
            some if norm is None else norm(some.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            for some, norm in zip(projected, self._norms, strict=False)
        ]
        if self.embeddings is not None:
            projected = [some.to(self.embeddings) for some in projected]
        if self.kind == "tied":
            return Compared(projected[0][None])
        queries, keys = projected
        if self.heads == "groups":
            return Compared(*by_group(queries, keys, self.head_dim))
        queries, keys = comparable(queries, keys, self.head_dim)
        return Compared(queries[None], keys[None])


def head_norm(attention: nn.Module, name: str, head_dim: int) -> nn.Module | None:
    """The norm of that name, of the queries or keys of each head; None: the attention has none."""
    norm: Any = getattr(attention, name, None)
    if norm is not None and norm.weight.shape != (head_dim,):
        raise ValueError(
            f"{name} of {type(attention).__name__} has weights {list(norm.weight.shape)}, but only norms of single "
            f"heads, [{head_dim}], are supported; use heads.kind=correspondence, and features head and hidden"
        )
    return norm


def comparable(queries: Tensor, keys: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Queries `[N, Hq * d]` and keys `[N, Hk * d]` in one width: unchanged if `Hq = Hk`, else averaged over heads."""
    if queries.shape[-1] == keys.shape[-1]:
        return queries, keys
    return queries.unflatten(-1, (-1, head_dim)).mean(-2), keys.unflatten(-1, (-1, head_dim)).mean(-2)


def by_group(queries: Tensor, keys: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Queries `[N, Hq * d]` and keys `[N, Hk * d]` of each head group, `[Hk, N, d]`: the mean of its query heads."""
    keys = keys.unflatten(-1, (-1, head_dim))  # [N, Hk, d]
    queries = queries.unflatten(-1, (keys.shape[-2], -1, head_dim)).mean(-2)
    return queries.transpose(0, 1), keys.transpose(0, 1)

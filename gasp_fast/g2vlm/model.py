"""DINOv2 patches and Qwen2-VL tokens in one transformer of two experts, then the geometry heads.

    images ──> DINOv2 (frozen) ──> linear map, zero at first ──> geometric tokens ─┐
    text   ──> embedding ────────────────────────────────────────> semantic tokens ┼─> experts ─> heads ──> Geometry
    images ──> Qwen2-VL's vision tower (frozen) ─────────────────> semantic tokens ┘          └─> lm head ─> text loss

Parameters are float32. On a GPU, everything up to the final norms runs under bf16 autocast, where the residual streams
stay float32; the geometry heads run in float32: a plane rounded to bf16 has errors of 20 degrees in its normals.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import Questions
from .cache import Cache
from .experts import Experts, ExpertsConfig
from .losses import Geometry
from .tokens import Arrangement, context_positions, text_positions

FROZEN = ("semantic", "geometric", "none")
IGNORED = -100  # label of a token that is not predicted


@dataclass(frozen=True)
class States:
    """Hidden states after the final norms."""

    patches: Tensor  # [B, F, P, width]
    tail: Tensor  # [B, S, width]


@dataclass(frozen=True)
class Output:
    geometry: Geometry | None
    text_loss: Tensor | None  # mean cross entropy of labelled tokens, 0 where there is none; None without questions


class G2VLM(nn.Module):
    """`heads(hidden [B, F, P, width], rows, columns)` returns the `Geometry` of P = rows * columns patches a frame.

    They get float32 outside of autocast here, and must keep to it also where the caller's autocast is on.
    """

    def __init__(self, qwen: Any, encoder: Any, heads: nn.Module, config: ExpertsConfig | None = None) -> None:
        """From a Qwen2VLForConditionalGeneration, which must not be used afterwards, and a Dinov2WithRegistersModel."""
        super().__init__()
        decoder, sizes = qwen.model.language_model, qwen.config.text_config
        self.qwen_config, self.config = qwen.config, config or ExpertsConfig()
        self.marks: Tensor
        marks = [qwen.config.vision_start_token_id, qwen.config.vision_end_token_id]  # around each frame
        self.register_buffer("marks", torch.tensor(marks), persistent=False)
        self.encoder = encoder
        self.visual = qwen.model.visual
        self.embedding = decoder.embed_tokens
        self.lm_head = copy.deepcopy(qwen.lm_head)  # of its own, also where Qwen ties it to the embedding
        self.patch_map = nn.Linear(encoder.config.hidden_size, sizes.hidden_size)
        nn.init.zeros_(self.patch_map.weight)
        nn.init.zeros_(self.patch_map.bias)
        self.experts = Experts(sizes, self.config)
        _copy_decoder(decoder, self.experts)
        self.heads = heads
        self.gasp: Any = None  # heads and loss of GASP, where it supervises the semantic expert: see `supervision`
        self.freeze("none")

    def freeze(self, expert: str) -> None:
        """Freeze the "semantic" expert (pretraining), the "geometric" one (CE with frozen geometry), or "none".

        Embedding and lm head belong to the semantic expert, linear map and heads to the geometric one. DINOv2 and
        Qwen2-VL's vision tower are always frozen.
        """
        if expert not in FROZEN:
            raise ValueError(f"freeze({expert!r}) is unknown; choose one of {', '.join(FROZEN)}")
        self.encoder.requires_grad_(False)
        self.visual.requires_grad_(False)
        for part in (*self.experts.of("semantic"), self.embedding, self.lm_head):
            part.requires_grad_(expert != "semantic")
        for part in (*self.experts.of("geometric"), self.patch_map, self.heads):
            part.requires_grad_(expert != "geometric")

    def train(self, mode: bool = True) -> G2VLM:
        """The frozen encoders stay in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        self.visual.eval()
        return self

    def forward(
        self,
        images: Tensor | None,  # [B, F, 3, H, W], ImageNet-normalised
        questions: Questions | None = None,
        prefix: Tensor | None = None,  # int64 [B, T], text before the frames
        with_geometry: bool = True,  # False: skip the heads, where only the text loss is needed
    ) -> Output:
        states, arrangement = self.states(images, questions, prefix)
        geometry = None
        if images is not None and with_geometry:
            geometry = self.heads(states.patches.float(), arrangement.rows, arrangement.columns)
        return Output(geometry, None if questions is None else self._text_loss(states.tail, questions.labels))

    def _text_loss(self, tail: Tensor, labels: Tensor) -> Tensor:
        """Logits are computed for the tokens before labelled ones only: [B, S, width], [B, S] -> scalar."""
        following = labels[:, 1:]
        is_labelled = following != IGNORED  # [B, S - 1]
        predicted = following[is_labelled]  # [L]
        with self.autocast(tail.device):
            logits = self.lm_head(tail[:, :-1][is_labelled])  # [L, vocabulary]
        return F.cross_entropy(logits.float(), predicted, reduction="sum") / max(len(predicted), 1)

    def states(
        self,
        images: Tensor | None,
        questions: Questions | None = None,
        prefix: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[States, Arrangement]:
        """Hidden states of patches and tail, and the arrangement of the tokens.

        An empty `cache` gets keys and values of all tokens, for `read`; questions are then read, not given here.
        """
        if cache is not None and (questions is not None or cache.length or torch.is_grad_enabled()):
            raise ValueError("cache must be empty, questions be None and gradients off; pass questions to read()")
        given = [tensor for tensor in (images, prefix) if tensor is not None]
        given += [] if questions is None else [questions.input_ids]
        if not given:
            raise ValueError("images, questions and prefix are all None; give at least one of them")
        batch, device = len(given[0]), given[0].device
        if prefix is None:
            prefix = torch.zeros(batch, 0, dtype=torch.long, device=device)
        arrangement = self._arrange(images, questions, prefix)
        with self.autocast(device):
            marks = self.marks.repeat(batch, arrangement.frames)  # [B, 2 F]
            semantic = [self.embedding(torch.cat([marks, prefix], 1))]
            positions = [context_positions(arrangement, device)[:, None].expand(-1, batch, -1)]
            if questions is not None:
                semantic.append(self._tail(questions))
                positions.append(arrangement.tail_position + self._tail_positions(questions))
            geometric = semantic[0][:, :0] if images is None else self._patches(images)
            geometric, others = self.experts(
                geometric, torch.cat(semantic, 1), torch.cat(positions, -1), arrangement, cache
            )
        if cache is not None:
            cache.position = arrangement.tail_position
        patches = geometric.unflatten(1, (arrangement.frames, arrangement.rows * arrangement.columns))
        return States(patches, others[:, arrangement.marks + arrangement.prefix :]), arrangement

    def read(self, tail: Questions | Tensor, cache: Cache) -> Tensor:
        """Logits [B, vocabulary] of the token after `tail`, whose tokens follow those in the cache and are added to it.

        `tail` is conversations without padding, or ids [B, n] of text.
        """
        ids = tail if isinstance(tail, Tensor) else tail.input_ids
        with self.autocast(ids.device):
            if isinstance(tail, Tensor):
                embedded, positions = self.embedding(ids), text_positions(ids, IGNORED)
            else:
                embedded, positions = self._tail(tail), self._tail_positions(tail)
            hidden = self.experts.extend(embedded, cache.position + positions, cache)
            logits = self.lm_head(hidden[:, -1])
        cache.position += int(positions[..., -1].max()) + 1
        return logits.float()

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision of everything but the heads."""
        return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def _arrange(self, images: Tensor | None, questions: Questions | None, prefix: Tensor) -> Arrangement:
        tail = 0 if questions is None else questions.input_ids.shape[1]
        if images is None:
            return Arrangement(prefix=prefix.shape[1], tail=tail)
        frames, _, height, width = images.shape[1:]
        patch = self.encoder.config.patch_size
        if height % patch or width % patch:
            raise ValueError(
                f"images are {height} x {width} pixels; give multiples of {patch}, the encoder's patch size"
            )
        return Arrangement(frames, height // patch, width // patch, prefix.shape[1], tail)

    def _patches(self, images: Tensor) -> Tensor:
        """Geometric tokens: [B, F, 3, H, W] -> [B, F P, width]."""
        with torch.no_grad():
            pixels = images.flatten(0, 1).to(self.encoder.dtype)
            features = self.encoder(pixels).last_hidden_state  # [B F, 1 + registers + P, C]
        features = features[:, 1 + self.encoder.config.num_register_tokens :]
        return self.patch_map(features.reshape(len(images), -1, features.shape[-1]))

    def _tail(self, questions: Questions) -> Tensor:
        """Embedded text, in which ViT tokens replace image tokens: [B, S, width]."""
        embedded = self.embedding(questions.input_ids)
        if questions.pixel_values is None or not len(questions.pixel_values):
            return embedded
        with torch.no_grad():
            features = self.visual(questions.pixel_values, grid_thw=questions.image_grid_thw).pooler_output
        is_image = questions.input_ids == self.qwen_config.image_token_id
        return embedded.masked_scatter(is_image[..., None], features.to(embedded.dtype))

    def _tail_positions(self, questions: Questions) -> Tensor:
        merge = self.qwen_config.vision_config.spatial_merge_size
        return text_positions(questions.input_ids, self.qwen_config.image_token_id, questions.image_grid_thw, merge)


def _copy_decoder(decoder: Any, experts: Experts) -> None:
    """Give both experts the weights of Qwen2-VL's decoder."""
    for kind in ("geometric", "semantic"):
        *layers, norm = experts.of(kind)
        for expert, source in zip(layers, decoder.layers, strict=True):
            _copy_layer(source, expert)
        norm.load_state_dict(decoder.norm.state_dict())


@torch.no_grad()
def _copy_layer(source: Any, expert: Any) -> None:
    attention, mlp = source.self_attn, source.mlp
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    expert.qkv.weight.copy_(torch.cat([projection.weight for projection in projections]))
    expert.qkv.bias.copy_(torch.cat([projection.bias for projection in projections]))
    pairs = [
        (expert.out, attention.o_proj),
        (expert.gate, mlp.gate_proj),
        (expert.up, mlp.up_proj),
        (expert.down, mlp.down_proj),
        (expert.input_norm, source.input_layernorm),
        (expert.post_norm, source.post_attention_layernorm),
    ]
    for ours, theirs in pairs:
        ours.weight.copy_(theirs.weight)

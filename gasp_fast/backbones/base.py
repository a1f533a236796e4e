"""What every supported vision-language model tells the rest of the project, and the registry of those that do.

A `Backbone` is made from a model's configuration and processor alone, so that data loaders can use it in workers; the
model itself, where one is needed, is an argument. It is the only place that knows a model's layout: its modules, its
visual tokens, its processor. It knows nothing of losses, heads, scenes or training.

A new model is one new file in this folder: a subclass with `model_type` set to the `model_type` of the model's
`config.json`, decorated with `@register`, filling in the abstract methods. Every module of this folder is imported
before a lookup; a class registered from outside the package works just as well.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .chat import ChatFormat, Message
from .token_grid import TokenGrid

Frame = NDArray[np.uint8]  # [H, W, 3], RGB


@dataclass(frozen=True)
class Conversation:
    """One sequence as data: the frames it shows (possibly none) and what is said about them."""

    frames: Sequence[Frame]
    messages: Sequence[Message]


@dataclass(frozen=True)
class Encoded:
    """A batch as the model takes it, and where its frames went."""

    inputs: dict[str, Tensor]  # keyword arguments of the model's forward, labels included
    grids: list[list[TokenGrid]]  # of every frame of every sequence
    positions: list[Tensor]  # per sequence int64 [tokens of all its frames], flat indices into B * S, frame by frame


@dataclass(frozen=True)
class AttentionShape:
    """Head counts of the language model's attention."""

    query_heads: int
    key_heads: int
    head_dim: int


class Backbone(ABC):
    """One model family: its layout, its visual tokens and the way it is fed."""

    model_type: ClassVar[str]
    # q, k, v and o of the language model. The module path must be part of the pattern: a vision tower has layers of
    # the same names.
    lora_targets: ClassVar[str] = r".*language_model.*\.(q|k|v|o)_proj"
    one_frame_count: ClassVar[bool] = False  # all sequences of a batch that show frames must show equally many

    def __init__(self, source: str, config: Any, processor: Any) -> None:
        self.source = source
        self.config = config
        self.processor = processor
        self.chat = ChatFormat(processor, self._reserved_tokens())

    # ---- the model's layout ------------------------------------------------------------------------------------------

    @property
    def layer_count(self) -> int:
        """L, the number of decoder layers."""
        return self.config.text_config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.config.text_config.hidden_size

    @property
    def attention_shape(self) -> AttentionShape:
        text = self.config.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return AttentionShape(text.num_attention_heads, key_heads, head_dim)

    def language_model(self, model: nn.Module) -> Any:
        """The decoder stack: a module with `layers` and a final `norm`."""
        return unwrap(model).model.language_model

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        return self.language_model(model).layers

    def final_norm(self, model: nn.Module) -> nn.Module:
        return self.language_model(model).norm

    def attention(self, model: nn.Module, layer: int) -> Any:
        """The self-attention of a decoder layer (its `q_proj` and `k_proj` are linear layers)."""
        layers: Any = self.decoder_layers(model)
        return layers[layer].self_attn

    def query_projection(self, model: nn.Module, layer: int) -> tuple[Tensor, Tensor | None]:
        """W_Q of a layer: weight `[outputs, hidden]` and bias `[outputs]` or None, without any adapter on top."""
        projection = self.attention(model, layer).q_proj  # under peft, its weight is still the original one
        return projection.weight, projection.bias

    def load_model(self, dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa", **options: Any) -> nn.Module:
        """The real transformers model, from safetensors only and without running code that ships with weights."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(
            self.source,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )

    def quicken(self, model: nn.Module) -> None:  # noqa: B027 (nothing to do, for most)
        """Replace what transformers computes the long way round; the mathematics stays the same."""

    # ---- visual tokens -----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def visual_token_id(self) -> int:
        """The id in `input_ids` that stands for one visual token of a frame."""

    @abstractmethod
    def frame_grid(self, width: int, height: int) -> TokenGrid:
        """Where the visual tokens of a frame of that size lie on it, after the processor's resize and crop."""

    def limit_frame_pixels(self, frame_pixels: int) -> None:
        """Cap the pixels of one frame after resizing, and with them its tokens."""
        raise ValueError(
            f"frame_pixels = {frame_pixels} does not apply to {self.model_type}, whose frames have one fixed size; "
            "leave it out"
        )

    # ---- feeding -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def visual_content(self, frames: int) -> list[dict[str, str]]:
        """The chat-template entries for that many frames at the start of a user turn."""

    @abstractmethod
    def visual_arguments(self, batch: Sequence[Sequence[Frame]]) -> dict[str, Any]:
        """The processor's keyword arguments for the frames of several sequences, each with at least one frame."""

    def check_inputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:  # noqa: B027 (optional)
        """Start-up guard: raise if the model would silently misread these inputs. Many models have nothing to check."""

    def encode(self, batch: Sequence[Conversation], answer_next: bool = False) -> Encoded:
        """Run the real processor over a batch; label the answers; say where each frame's tokens are.

        `answer_next` ends each prompt where the assistant would begin (for generation).
        """
        if not batch:
            raise ValueError("batch is empty; encode needs at least one conversation")
        rendered = []
        for index, conversation in enumerate(batch):
            _check_frames(conversation.frames, index)
            visual = self.visual_content(len(conversation.frames)) if conversation.frames else []
            rendered.append(self.chat.render(conversation.messages, visual, answer_next))
        shown = [conversation.frames for conversation in batch if conversation.frames]
        inputs = dict(
            self.processor(
                text=[one.text for one in rendered],
                padding=True,
                padding_side="right",
                return_tensors="pt",
                **(self.visual_arguments(shown) if shown else {}),
            )
        )
        self._check_length(inputs["input_ids"])
        grids = [[self.frame_grid(f.shape[1], f.shape[0]) for f in one.frames] for one in batch]
        positions = self._positions(inputs["input_ids"], grids)
        inputs["labels"] = self.chat.labels(
            rendered, inputs["input_ids"], inputs["attention_mask"], self.visual_token_id
        )
        return Encoded(inputs, grids, positions)

    def _positions(self, input_ids: Tensor, grids: list[list[TokenGrid]]) -> list[Tensor]:
        """Flat positions of each sequence's visual tokens. Sequences, frames and rows appear in that order."""
        length = input_ids.shape[1]
        positions = []
        for row, frames in enumerate(grids):
            found = (input_ids[row] == self.visual_token_id).nonzero()[:, 0] + row * length
            expected = sum(grid.tokens for grid in frames)
            if len(found) != expected:
                raise ValueError(
                    f"sequence {row}: {type(self.processor).__name__} made {len(found)} visual tokens of {len(frames)} "
                    f"frames, the token grids of {type(self).__name__} say {expected}; its pixel map does not hold for "
                    "this processor's settings"
                )
            positions.append(found)
        return positions

    def _check_length(self, input_ids: Tensor) -> None:
        longest = getattr(self.config.text_config, "max_position_embeddings", None)
        if longest is not None and input_ids.shape[1] > longest:
            raise ValueError(
                f"the batch has {input_ids.shape[1]} tokens, {self.source} takes {longest}; "
                "use fewer frames per sequence, or fewer pixels per frame"
            )

    def _reserved_tokens(self) -> list[str]:
        return [getattr(self.processor, name, "") for name in ("image_token", "video_token")]


BACKBONES: dict[str, type[Backbone]] = {}
Family = TypeVar("Family", bound=type[Backbone])


def register(family: Family) -> Family:
    """Class decorator that makes a backbone known under its `model_type`."""
    if family.model_type in BACKBONES and BACKBONES[family.model_type].__qualname__ != family.__qualname__:
        taken = BACKBONES[family.model_type].__name__
        raise ValueError(f"model_type = {family.model_type!r} of {family.__name__} is already taken by {taken}")
    BACKBONES[family.model_type] = family
    return family


def supported_models() -> list[str]:
    """The `model_type` of every registered backbone."""
    package = str(Path(__file__).parent)
    for module in pkgutil.iter_modules([package]):
        importlib.import_module(f"{__package__}.{module.name}")
    return sorted(BACKBONES)


def load_backbone(source: str | os.PathLike[str], frame_pixels: int | None = None) -> Backbone:
    """The backbone of a model folder or hub name, chosen by the `model_type` in its `config.json`.

    `frame_pixels` limits the pixels of one frame after resizing, for models whose processor keeps the aspect ratio;
    models with one fixed input size refuse it.
    """
    from transformers import AutoConfig, AutoProcessor, PretrainedConfig

    source = os.fspath(source)
    supported = supported_models()
    try:
        model_type = PretrainedConfig.get_config_dict(source)[0].get("model_type")
    except OSError as error:
        raise OSError(
            f"model = {source!r} has no readable config.json; pass a folder with a saved model, or a hub name"
        ) from error
    if model_type not in supported:
        raise ValueError(
            f"model = {source!r} is of type {model_type!r}; supported types are {', '.join(supported)} "
            "(a new one is one file in gasp_fast/backbones)"
        )
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    backbone = BACKBONES[model_type](source, config, processor)
    if frame_pixels is not None:
        backbone.limit_frame_pixels(frame_pixels)
    return backbone


def unwrap(model: Any) -> Any:
    """The transformers model inside DDP, DeepSpeed, torch.compile and peft wrappers."""
    while True:
        if hasattr(model, "get_base_model"):  # peft
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):  # DDP, DeepSpeed
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        else:
            return model


def _check_frames(frames: Sequence[Frame], sequence: int) -> None:
    for index, frame in enumerate(frames):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(
                f"frame {index} of sequence {sequence} is {frame.dtype} {list(frame.shape)}; frames are uint8 [H, W, 3]"
            )
